#include "image.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <stdexcept>

#ifdef WITH_JPEG
#include <csetjmp>
// After cstdio, which it needs.
#include <jpeglib.h>
#endif

namespace {

Image read_ppm(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    std::string magic;
    Image image;
    int largest = 0;
    file >> magic >> image.width >> image.height >> largest;
    file.get();  // one white space
    if (!file || magic != "P6" || largest != 255 || image.width < 1 || image.height < 1)
        throw std::runtime_error(path + " is no binary PPM of 8 bits (P6, 255)");
    image.pixels.resize(std::size_t(3) * image.height * image.width);
    file.read(reinterpret_cast<char*>(image.pixels.data()), image.pixels.size());
    if (!file)
        throw std::runtime_error(path + " is cut off");
    return image;
}

#ifdef WITH_JPEG
struct JpegErrors {
    jpeg_error_mgr manager;
    std::jmp_buf back;
    char message[JMSG_LENGTH_MAX];
};

void fail(j_common_ptr common) {
    auto* errors = reinterpret_cast<JpegErrors*>(common->err);
    common->err->format_message(common, errors->message);
    std::longjmp(errors->back, 1);
}

Image read_jpeg(const std::string& path) {
    std::FILE* file = std::fopen(path.c_str(), "rb");
    if (file == nullptr)
        throw std::runtime_error("cannot open " + path);
    Image image;
    jpeg_decompress_struct info;
    JpegErrors errors;
    info.err = jpeg_std_error(&errors.manager);
    errors.manager.error_exit = fail;
    if (setjmp(errors.back)) {
        jpeg_destroy_decompress(&info);
        std::fclose(file);
        throw std::runtime_error(path + ": " + errors.message);
    }
    jpeg_create_decompress(&info);
    jpeg_stdio_src(&info, file);
    jpeg_read_header(&info, TRUE);
    info.out_color_space = JCS_RGB;
    jpeg_start_decompress(&info);
    image.height = static_cast<int>(info.output_height);
    image.width = static_cast<int>(info.output_width);
    const std::size_t stride = std::size_t(3) * image.width;
    image.pixels.resize(stride * image.height);
    while (info.output_scanline < info.output_height) {
        JSAMPROW row = image.pixels.data() + stride * info.output_scanline;
        jpeg_read_scanlines(&info, &row, 1);
    }
    jpeg_finish_decompress(&info);
    jpeg_destroy_decompress(&info);
    std::fclose(file);
    return image;
}
#endif

// Which inputs make an output, and how much of each.
struct Taps {
    int first = 0;
    std::vector<std::int32_t> weights;
};

constexpr int kBits = 22;  // of a weight's fraction

std::vector<Taps> bilinear_taps(int in, int out) {
    const double scale = static_cast<double>(in) / out;
    const double reach = std::max(scale, 1.0);
    std::vector<Taps> all(out);
    for (int i = 0; i < out; ++i) {
        const double centre = (i + 0.5) * scale;
        const int first = std::max(static_cast<int>(centre - reach + 0.5), 0);
        const int last = std::min(static_cast<int>(centre + reach + 0.5), in);
        std::vector<double> weights;
        double sum = 0;
        for (int x = first; x < last; ++x) {
            const double distance = std::abs((x - centre + 0.5) / reach);
            weights.push_back(distance < 1 ? 1 - distance : 0);
            sum += weights.back();
        }
        all[i].first = first;
        for (double weight : weights)
            all[i].weights.push_back(
                static_cast<std::int32_t>(0.5 + weight / sum * (1 << kBits)));
    }
    return all;
}

std::uint8_t rounded(std::int32_t value) {
    return static_cast<std::uint8_t>(std::clamp(value >> kBits, 0, 255));
}

Image resize_rows(const Image& image, int width) {
    const auto taps = bilinear_taps(image.width, width);
    Image result{image.height, width, {}};
    result.pixels.resize(std::size_t(3) * image.height * width);
    for (int y = 0; y < image.height; ++y)
        for (int x = 0; x < width; ++x)
            for (int c = 0; c < 3; ++c) {
                std::int32_t sum = 1 << (kBits - 1);
                for (std::size_t i = 0; i < taps[x].weights.size(); ++i)
                    sum += taps[x].weights[i] *
                           image.pixels[(std::size_t(y) * image.width + taps[x].first + i) * 3 + c];
                result.pixels[(std::size_t(y) * width + x) * 3 + c] = rounded(sum);
            }
    return result;
}

Image resize_columns(const Image& image, int height) {
    const auto taps = bilinear_taps(image.height, height);
    const std::size_t stride = std::size_t(3) * image.width;
    Image result{height, image.width, {}};
    result.pixels.resize(stride * height);
    for (int y = 0; y < height; ++y)
        for (std::size_t x = 0; x < stride; ++x) {
            std::int32_t sum = 1 << (kBits - 1);
            for (std::size_t i = 0; i < taps[y].weights.size(); ++i)
                sum += taps[y].weights[i] * image.pixels[(taps[y].first + i) * stride + x];
            result.pixels[y * stride + x] = rounded(sum);
        }
    return result;
}

}  // namespace

Image read_image(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    if (!file)
        throw std::runtime_error("cannot open " + path);
    const bool is_ppm = file.get() == 'P';
    if (is_ppm)
        return read_ppm(path);
#ifdef WITH_JPEG
    return read_jpeg(path);
#else
    throw std::runtime_error(path + " is no PPM, and this program was built without libjpeg");
#endif
}

Image resize(const Image& image, int height, int width) {
    Image result = image.width == width ? image : resize_rows(image, width);
    return result.height == height ? result : resize_columns(result, height);
}
