#include "decode/cold_reader.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace moebox {

ColdReader::ColdReader(RamRows& rows, Reader& reader, std::vector<Extent> extents)
    : rows_(rows), reader_(reader), extents_(std::move(extents)) {
  const std::size_t n_keys = rows.residency().n_keys();
  if (extents_.size() != n_keys)
    throw std::invalid_argument("extents: of " + std::to_string(extents_.size()) +
                                " experts given, of n_keys=" + std::to_string(n_keys) + " needed");
}

void ColdReader::attach(const Stores& stores) {
  for (std::size_t key = 0; key < extents_.size(); ++key) {
    std::size_t bytes = 0;
    for (const Run& run : extents_[key].runs) bytes += run.nbytes;
    if (bytes != stores.expert_bytes)
      throw std::invalid_argument("extents[" + std::to_string(key) + "]: " + std::to_string(bytes) +
                                  " bytes given, an expert's " + std::to_string(stores.expert_bytes) +
                                  " needed");
  }
  stores_ = stores;
}

void ColdReader::read(std::int32_t key) {
  const std::int32_t row = rows_.place(key);
  if (row < 0) throw std::logic_error("no row of RAM is free for expert key " + std::to_string(key));
  rows_.keep(key);
  auto* target = reinterpret_cast<std::byte*>(stores_.row(row));
  const auto& [runs, checksum] = extents_[key];
  reads_.push_back({key, reader_.submit(runs, target, false, checksum)});
}

std::int32_t ColdReader::arrival() {
  auto ended = std::ranges::find_if(reads_, [this](const Read& read) { return reader_.ready(read.ticket); });
  if (ended == reads_.end()) ended = reads_.begin();
  const auto [key, ticket] = *ended;
  reads_.erase(ended);
  try {
    reader_.wait(ticket);
  } catch (...) {
    failed_ = key;
    rows_.drop(key);
    throw;
  }
  rows_.arrived(key);
  return key;
}

void ColdReader::cancel() {
  for (const Read& read : reads_) {
    reader_.cancel(read.ticket);
    rows_.drop(read.key);
  }
  reads_.clear();
}

}  // namespace moebox
