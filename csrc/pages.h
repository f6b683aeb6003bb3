// Memory of large images: the pages that one gives back become the next one's, of whatever size, so that no step of
// training waits for the system to map new ones and to fill them with zeros.
#pragma once

#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/fill.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <list>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "bound.h"

namespace fused_densenet {

// Its pages are never more than what was lent at once: what is kept is lent before any is mapped, moved to where it is
// wanted (mremap), which touches none of it.
class Pages final : public c10::Allocator {
 public:
  static Pages& instance() {
    static Pages* const pages = [] {  // tensors may outlive every static object
      // A child that another thread's allocation would leave locked.
      pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); },
                     [] { instance().mutex_.unlock(); });
      return new Pages;
    }();
    return *pages;
  }

  c10::DataPtr allocate(size_t bytes) override {
    if (bytes < kLeast) return c10::GetCPUAllocator()->allocate(bytes);
    const std::lock_guard<std::mutex> lock(mutex_);
    const size_t size = (bytes + kUnit - 1) / kUnit * kUnit;
    Region region = take(size);
    if (region.empty()) return c10::GetCPUAllocator()->allocate(bytes);  // which says that there is no memory
    void* const data = region.front().data;
    lent_.emplace(data, Lent{{std::move(region), size}, bytes});
    lent_bytes_ += bytes;
    report(data, static_cast<int64_t>(bytes));
    return {data, data, give_back, c10::Device(c10::DeviceType::CPU)};
  }
  void copy_data(void* to, const void* from, std::size_t bytes) const override { std::memcpy(to, from, bytes); }

  // Gives what is kept back to the system.
  void release() {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const Kept& kept : kept_) {
      for (const Piece& piece : kept.region) munmap(piece.data, piece.bytes);
    }
    kept_.clear();
    kept_bytes_ = 0;
  }

 private:
  // Of what is smaller, malloc keeps most itself. Whole tables of pages are moved at once.
  static constexpr size_t kLeast = 8 << 20, kUnit = 2 << 20;

  struct Piece {  // of one mapping
    char* data;
    size_t bytes;
  };
  using Region = std::vector<Piece>;  // neighbours
  struct Kept {
    Region region;
    size_t bytes;
  };
  struct Lent {
    Kept pages;
    size_t bytes;  // that were asked for
  };

  // Nothing where there is no room for it.
  Region take(size_t bytes) {
    const auto same = std::find_if(kept_.begin(), kept_.end(), [&](const Kept& kept) { return kept.bytes == bytes; });
    if (same != kept_.end()) {
      Region region = std::move(same->region);
      kept_.erase(same);
      kept_bytes_ -= bytes;
      return region;
    }
    char* const begin = map(bytes);
    if (begin == nullptr) return {};
    Region region;
    size_t filled = 0;
    while (filled < bytes && !kept_.empty()) {
      Kept& from = kept_.front();
      Piece& piece = from.region.back();
      const size_t moved = std::min(piece.bytes, bytes - filled);
      char* const source = piece.data + piece.bytes - moved;
      if (mremap(source, moved, moved, MREMAP_MAYMOVE | MREMAP_FIXED, begin + filled) == MAP_FAILED) break;
      region.push_back({begin + filled, moved});
      filled += moved;
      kept_bytes_ -= moved;
      from.bytes -= moved;
      piece.bytes -= moved;
      if (piece.bytes == 0) from.region.pop_back();
      if (from.bytes == 0) kept_.pop_front();
    }
    if (filled < bytes) region.push_back({begin + filled, bytes - filled});
    return region;
  }

  // New memory, whose pages are mapped when they are first touched.
  static char* map(size_t bytes) {
    void* const found = mmap(nullptr, bytes + kUnit, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (found == MAP_FAILED) return nullptr;
    char* const first = static_cast<char*>(found);
    const size_t before = (kUnit - reinterpret_cast<uintptr_t>(first) % kUnit) % kUnit;
    if (before > 0) munmap(first, before);
    munmap(first + before + bytes, kUnit - before);
    return first + before;
  }

  static void give_back(void* data) {
    Pages& pages = instance();
    const std::lock_guard<std::mutex> lock(pages.mutex_);
    const auto found = pages.lent_.find(data);
    const size_t bytes = found->second.bytes;
    pages.lent_bytes_ -= bytes;
    pages.kept_bytes_ += found->second.pages.bytes;
    pages.kept_.push_back(std::move(found->second.pages));
    pages.lent_.erase(found);
    pages.report(data, -static_cast<int64_t>(bytes));
  }

  void report(void* data, int64_t bytes) const {
    c10::reportMemoryUsageToProfiler(data, bytes, lent_bytes_, lent_bytes_ + kept_bytes_,
                                     c10::Device(c10::DeviceType::CPU));
  }

  std::mutex mutex_;
  std::list<Kept> kept_;  // the longest kept first
  std::unordered_map<void*, Lent> lent_;
  size_t kept_bytes_ = 0, lent_bytes_ = 0;
};

// Uninitialised; filled where torch was asked to fill such memory.
inline at::Tensor empty_pages(at::IntArrayRef size, at::IntArrayRef stride, at::ScalarType dtype) {
  const c10::DispatchKeySet keys(c10::DispatchKey::CPU);
  at::Tensor result = at::detail::empty_strided_generic(size, stride, &Pages::instance(), keys, dtype);
  if (fills_empty_memory()) at::fill_(result, std::numeric_limits<double>::quiet_NaN());
  return result;
}

}  // namespace fused_densenet
