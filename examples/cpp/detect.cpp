// Detections of an exported model on one image, as Python prints them.
//
//   detect MODEL.xml IMAGE [MIN_SCORE] [DEVICE]
//
// One line for each: class, score, and x1 y1 x2 y2 in pixels of the image.

#include <cstdlib>
#include <iomanip>
#include <iostream>
#include <openvino/openvino.hpp>
#include <stdexcept>
#include <string>
#include <vector>

#include "image.hpp"

namespace {

// The strings of the array `key` of a JSON object; enough for names of classes.
std::vector<std::string> string_array(const std::string& json, const std::string& key) {
    std::vector<std::string> found;
    auto at = json.find("\"" + key + "\": [");
    if (at == std::string::npos)
        throw std::runtime_error("the model's metadata lack " + key);
    at = json.find('[', at) + 1;
    while (at < json.size() && json[at] != ']') {
        if (json[at] != '"') {
            ++at;
            continue;
        }
        std::string text;
        for (++at; json[at] != '"'; ++at) {
            if (json[at] == '\\')
                ++at;
            text += json[at];
        }
        ++at;
        found.push_back(text);
    }
    return found;
}

void require(const std::string& json, const std::string& key, const std::string& value) {
    if (json.find("\"" + key + "\": \"" + value + "\"") == std::string::npos)
        throw std::runtime_error("this program needs a model whose " + key + " is " + value);
}

ov::Tensor to_tensor(const Image& image) {
    const std::size_t plane = std::size_t(image.height) * image.width;
    ov::Tensor tensor(ov::element::f32, {1, 3, std::size_t(image.height), std::size_t(image.width)});
    auto* values = tensor.data<float>();
    for (std::size_t i = 0; i < plane; ++i)
        for (int c = 0; c < 3; ++c)
            values[c * plane + i] = static_cast<float>(image.pixels[3 * i + c]) / 255.0f;
    return tensor;
}

void run(const std::string& model_path, const std::string& image_path, float min_score,
         const std::string& device) {
    ov::Core core;
    const auto model = core.read_model(model_path);
    if (!model->has_rt_info("mmbackbones"))
        throw std::runtime_error(model_path + " was not written by tools/export.py");
    const auto metadata = model->get_rt_info<std::string>("mmbackbones");
    require(metadata, "task", "detection");
    require(metadata, "resize", "stretch");
    const auto classes = string_array(metadata, "classes");
    const auto shape = model->input().get_partial_shape();
    const auto height = shape[2].get_length(), width = shape[3].get_length();

    // Without the hint, CPUs with bfloat16 would use it.
    auto compiled = core.compile_model(
        model, device, ov::hint::inference_precision(ov::element::f32));
    auto request = compiled.create_infer_request();
    const auto image = read_image(image_path);
    request.set_input_tensor(to_tensor(
        resize(image, static_cast<int>(height), static_cast<int>(width))));
    request.infer();

    const auto boxes = request.get_tensor("boxes");
    const auto scores = request.get_tensor("scores");
    const auto labels = request.get_tensor("labels");
    const float scale_x = static_cast<float>(image.width) / width;
    const float scale_y = static_cast<float>(image.height) / height;
    std::cout << std::fixed;
    for (std::size_t i = 0; i < scores.get_size(); ++i) {
        const float score = scores.data<float>()[i];
        if (score < min_score)
            continue;
        const float* box = boxes.data<float>() + 4 * i;
        std::cout << classes.at(labels.data<std::int64_t>()[i]) << '\t' << std::setprecision(4)
                  << score << std::setprecision(1);
        for (int k = 0; k < 4; ++k)
            std::cout << '\t' << box[k] * (k % 2 ? scale_y : scale_x);
        std::cout << '\n';
    }
}

}  // namespace

int main(int argc, char** argv) {
    if (argc < 3) {
        std::cerr << "usage: detect MODEL.xml IMAGE [MIN_SCORE] [DEVICE]\n";
        return 2;
    }
    try {
        run(argv[1], argv[2], argc > 3 ? std::strtof(argv[3], nullptr) : 0.4f,
            argc > 4 ? argv[4] : "CPU");
    } catch (const std::exception& error) {
        std::cerr << "error: " << error.what() << '\n';
        return 1;
    }
    return 0;
}
