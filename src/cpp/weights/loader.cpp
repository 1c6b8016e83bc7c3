#include "weights/loader.h"

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <span>
#include <tuple>
#include <utility>

#include "base/error.h"
#include "gemm/decode.h"
#include "weights/checksum.h"
#include "weights/cut.h"
#include "weights/fill.h"
#include "weights/homes.h"
#include "weights/layer_memory.h"
#include "weights/packed_file.h"
#include "weights/text.h"

namespace kt {
namespace fs = std::filesystem;
namespace {

// A dense matrix in bf16, row by row; nothing of one without data.
std::vector<bf16_t> rounded(Runtime& runtime, const MatView& from) {
  if (from.data == nullptr) return {};
  std::vector<bf16_t> rows(static_cast<std::size_t>(from.rows * from.cols));
  const Runtime::Lease lease(runtime);
  round_rows(lease.kernels().decode, from, rows.data());
  return rows;
}

// Whole, as mapped layers are.
Spread spread_over(const Runtime& runtime, const LayerPlan& plan, const SpreadOptions& options) {
  const bool split = options.placement == Placement::tensor;
  KT_CHECK(!split || options.popularity.empty(),
           "popularity is given, but placement is \"tensor\": every expert lies in all shards");
  const index_t align = cut_align(plan.types, plan.intermediate);
  Spread spread{runtime.split(plan.intermediate, align), /*split=*/false, options.placement};
  if (!split) spread.homes = assign_homes(plan.num_experts, weights_of(runtime), options.popularity);
  return spread;
}

// Memory of its own for a layer, with what `fill` writes there; it returns the errors of quantising.
template <class FillMemory>
Placed in_memory(const Runtime& runtime, const LayerPlan& plan, Spread spread, bool quantized,
                 const FillMemory& fill) {
  spread.split = spread.placement == Placement::tensor && spread.shards.size() > 1;
  const auto memory = std::make_shared<LayerMemory>(runtime, plan, spread);
  const std::array<QuantError, 3> errors = fill(memory->pieces());
  Placed placed = place(memory->pieces(), memory);
  if (spread.placement != Placement::tensor)
    placed.move = [memory](std::span<const int> homes) { return memory->move(homes); };
  placed.refused = memory->refused();
  placed.spread = std::move(spread);
  placed.quantized = quantized;
  placed.errors = errors;
  return placed;
}

// Keeps the disk busy with the matrices behind those that are being read: a single read waits for its own.
class ReadAhead {
 public:
  ReadAhead(const LayerSource& source, const std::vector<Matrix>& order) : source_(source), order_(order) {
    constexpr std::uint64_t kBytesAhead = 64 << 20;
    for (std::uint64_t bytes = 0; asked_ < order.size() && bytes < kBytesAhead;) bytes += ask(asked_++);
  }

  // A matrix is begun, and another one comes within reach.
  void advance() {
    if (const std::size_t next = asked_++; next < order_.size()) ask(next);
  }

 private:
  std::uint64_t ask(std::size_t i) const {
    const LayerSource::Stretch stretch = source_.stretch(order_[i].expert, order_[i].projection);
    source_.read_ahead(stretch);
    return stretch.bytes;
  }

  const LayerSource& source_;
  const std::vector<Matrix>& order_;
  std::atomic<std::size_t> asked_{0};
};

class CheckpointLayer {
 public:
  CheckpointLayer(std::shared_ptr<Runtime> runtime, std::shared_ptr<const ExpertIndex> index, int layer,
                  const LoadOptions& options, const Report& report)
      : runtime_(std::move(runtime)),
        index_(std::move(index)),
        layer_(layer),
        options_(options),
        report_(report),
        source_(index_->open(layer)),
        info_(source_->info()),
        plan_{info_.num_experts, info_.hidden_size, info_.intermediate_size, info_.types} {
    for (WeightType& type : plan_.types)
      if (options.format && *options.format != type.format) {
        type = traits_of(*options.format).quantized;
        convert_ = true;
      }
    spread_ = spread_over(*runtime_, plan_, options_.spread);
  }

  std::shared_ptr<Experts> load() {
    KT_CHECK(!options_.paged || !options_.cache_dir,
             "paged leaves the weights in the checkpoint's files, cache_dir puts them into packed ones: "
             "wanted one of them");
    index_->checkpoint().check_unchanged();
    Placed placed = options_.paged ? mapped() : options_.cache_dir ? packed() : loaded();
    if (info_.biases) placed.biases = biases();
    return std::make_shared<Experts>(runtime_, plan_, options_.activation, std::move(placed));
  }

 private:
  bool quantizes() const { return convert_ && *options_.format != Format::bf16; }

  std::array<std::vector<bf16_t>, 3> biases() const {
    std::array<std::vector<bf16_t>, 3> result;
    for (const Projection p : projections)
      result[index_of(p)].resize(static_cast<std::size_t>(info_.num_experts * info_.rows(p)));
    Runtime::Lease lease(*runtime_);
    lease.parallel_for(info_.num_experts, [&](index_t expert, Arena& scratch) {
      for (const Projection p : projections)
        source_->read_bias(static_cast<int>(expert), p, result[index_of(p)].data() + expert * info_.rows(p),
                           scratch, lease.kernels().decode);
    });
    return result;
  }

  Placed loaded() {
    return in_memory(*runtime_, plan_, spread_, quantizes(),
                     [this](std::span<const Piece> pieces) { return fill(pieces); });
  }

  // Checked as if it were read: the pages of its scales are.
  Placed mapped() {
    KT_CHECK(!convert_, "format is \"{}\", paged needs the one in the files: \"{}\"",
             name_of(*options_.format), name_of(info_.types.front().format));
    Placed placed;
    placed.memory = index_;
    placed.spread = spread_;
    for (auto& stack : placed.weights) stack.resize(static_cast<std::size_t>(info_.num_experts));
    {
      Runtime::Lease lease(*runtime_);
      lease.parallel_for(info_.num_experts, [&](index_t expert, Arena&) {
        for (const Projection p : projections)
          placed.weights[index_of(p)][static_cast<std::size_t>(expert)] =
              source_->map(static_cast<int>(expert), p);
      });
    }
    if (report_) report_(info_.nbytes);
    page_in(placed);
    return placed;
  }

  Placed packed() {
    const fs::path path = packed_path();
    PackedLayer wanted{plan_, index_->checkpoint().fingerprint(), quantizes(), {}};
    std::string why;
    auto file = PackedFile::open(path, wanted, why);
    if (!why.empty() && options_.warn)
      options_.warn(message("{}: ignored and made again: {}", quote(path.native()), why));
    if (file == nullptr) file = pack(path, wanted);
    if (report_) report_(info_.nbytes - packed_);
    // Of a mapping for reading: nobody writes there.
    const std::array pieces{whole_at(const_cast<std::byte*>(file->weights()))};
    Placed placed = place(pieces, file);
    placed.spread = spread_;
    placed.quantized = file->layer().quantized;
    placed.errors = file->layer().errors;
    placed.verify = [file](Runtime& runtime, const Report& report) { return file->verify(runtime, report); };
    page_in(placed);
    return placed;
  }

  std::shared_ptr<const PackedFile> pack(const fs::path& path, PackedLayer layer) {
    std::string why;
    PackedWriter writer(path, plan_, report_);
    if (auto file = PackedFile::open(path, layer, why)) return file;  // another process made it meanwhile
    layer.errors = fill(std::array{whole_at(writer.reserve())});
    packed_ = info_.nbytes;
    writer.commit(layer, *runtime_, report_);
    auto file = PackedFile::open(path, layer, why);
    if (file == nullptr)
      throw IoError(message("{}: cannot be read after it was written: {}", quote(path.native()), why));
    return file;
  }

  Piece whole_at(std::byte* memory) const { return {{0, plan_.intermediate}, plan_, memory}; }

  // One folder a checkpoint, told apart by where it is.
  fs::path packed_path() const {
    const fs::path from = fs::weakly_canonical(index_->checkpoint().path());
    const std::string& text = from.native();
    constexpr std::size_t kMostName = 200;  // of the 255 bytes a name may have
    const std::string tag = index_->tag(layer_);
    return *options_.cache_dir /
           message("{}-{}", from.filename().native().substr(0, kMostName),
                   checksum(std::as_bytes(std::span(text)))) /
           message("layer-{}{}{}.{}.ktmoe", layer_, tag.empty() ? "" : "-", tag,
                   name_of(plan_.types.front().format));
  }

  std::array<QuantError, 3> fill(std::span<const Piece> pieces) {
    const std::vector<Matrix> order = as_stored();
    ReadAhead ahead(*source_, order);
    const auto errors = fill_all(
        *runtime_, plan_, pieces, order, info_.nbytes,
        [&](const Matrix& m, const MutableWeight& into, const KernelSet& kernels, Arena& scratch) {
          ahead.advance();
          MutableWeight stored = into;
          stored.type = info_.types[index_of(m.projection)];
          const bool convert_it = stored.type != into.type;
          if (convert_it) stored = in_scratch(stored, scratch);
          source_->read(m.expert, m.projection, stored, scratch, kernels.decode);
          if (!convert_it) return QuantError{};
          const Weight w = frozen(stored);
          try {
            return convert(kernels, in_bf16(kernels, whole(w), scratch), into, scratch);
          } catch (const ValueError& error) {
            throw ValueError(message("{}: layer {}: {} of expert {}: {}",
                                     quote(index_->checkpoint().path().native()), layer_,
                                     name_of(m.projection), m.expert, error.what()));
          }
        },
        report_);
    index_->checkpoint().check_unchanged();  // what was read belongs together
    return errors;
  }

  // All matrices in the order in which the files have them.
  std::vector<Matrix> as_stored() const {
    std::vector<Matrix> order = matrices_of(plan_);
    std::ranges::stable_sort(order, {}, [&](const Matrix& m) {
      const auto [entry, begin, bytes] = source_->stretch(m.expert, m.projection);
      return std::tuple(entry->file, entry->tensor.offset + begin);
    });
    return order;
  }

  std::shared_ptr<Runtime> runtime_;
  std::shared_ptr<const ExpertIndex> index_;
  int layer_;
  const LoadOptions& options_;
  const Report& report_;
  std::shared_ptr<const LayerSource> source_;
  const LayerInfo& info_;
  LayerPlan plan_;
  Spread spread_;
  bool convert_ = false;
  std::size_t packed_ = 0;  // bytes already reported as read
};

}  // namespace

std::shared_ptr<Experts> experts_from_matrices(std::shared_ptr<Runtime> runtime, const LayerPlan& plan,
                                               Activation activation, const Matrices& matrices,
                                               const Biases& biases, const SpreadOptions& options) {
  const Fill fill = [&](const Matrix& m, const MutableWeight& into, const KernelSet& kernels,
                        Arena& scratch) {
    try {
      return convert(kernels, matrices(m.expert, m.projection), into, scratch);
    } catch (const ValueError& error) {
      throw ValueError(message("{}: expert {}: {}", name_of(m.projection), m.expert, error.what()));
    }
  };
  const bool quantized = plan.types.front().format != Format::bf16;
  Spread spread = spread_over(*runtime, plan, options);
  Placed placed = in_memory(*runtime, plan, std::move(spread), quantized, [&](std::span<const Piece> pieces) {
    return fill_all(*runtime, plan, pieces, matrices_of(plan), 0, fill, {});
  });
  for (const Projection p : projections) placed.biases[index_of(p)] = rounded(*runtime, biases[index_of(p)]);
  return std::make_shared<Experts>(std::move(runtime), plan, activation, std::move(placed));
}

std::shared_ptr<Experts> experts_from_checkpoint(std::shared_ptr<Runtime> runtime,
                                                 std::shared_ptr<const ExpertIndex> index, int layer,
                                                 const LoadOptions& options, const Report& report) {
  return CheckpointLayer(std::move(runtime), std::move(index), layer, options, report).load();
}

}  // namespace kt
