// Vectors as numpy arrays that own them.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstddef>
#include <utility>
#include <vector>

namespace moebox {

template <class T, class... Sizes>
nanobind::ndarray<nanobind::numpy, T> to_numpy(std::vector<T> values, Sizes... sizes) {
  auto* kept = new std::vector<T>(std::move(values));
  nanobind::capsule owner(kept, [](void* p) noexcept { delete static_cast<std::vector<T>*>(p); });
  return nanobind::ndarray<nanobind::numpy, T>(kept->data(), {static_cast<std::size_t>(sizes)...}, owner);
}

}  // namespace moebox
