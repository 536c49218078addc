// Reading and resizing images as the Python side does.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

// 8-bit RGB, row after row.
struct Image {
    int height = 0;
    int width = 0;
    std::vector<std::uint8_t> pixels;
};

// A binary PPM (P6), or a JPEG where the program was built with libjpeg. The EXIF
// orientation is not read. Throws std::runtime_error.
Image read_image(const std::string& path);

// Antialiased bilinear filter in the fixed-point arithmetic of Pillow.
Image resize(const Image& image, int height, int width);
