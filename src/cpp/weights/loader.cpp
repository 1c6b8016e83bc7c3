#include "weights/loader.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <span>
#include <tuple>
#include <utility>

#include "base/error.h"
#include "gemm/decode.h"
#include "weights/data_file.h"
#include "weights/json.h"
#include "weights/layer_memory.h"
#include "weights/packed_file.h"
#include "weights/shared_layer.h"

namespace kt {
namespace fs = std::filesystem;
namespace {

// A dense matrix in bf16, row by row; nothing of one without data.
std::vector<bf16_t> rounded(Runtime& runtime, const MatView& from) {
  if (from.data == nullptr) return {};
  std::vector<bf16_t> rows(to_size(from.rows * from.cols));
  const Runtime::Lease lease(runtime);
  round_rows(lease.kernels().decode, from, rows.data());
  return rows;
}

// A bf16, fp16 or fp32 matrix in the type of `into`; fp16 is rounded to bf16 before it is quantised.
QuantError convert(const KernelSet& kernels, const MatView& from, const MutableWeight& into, Arena& scratch) {
  const bool keep = into.type.format == Format::bf16;
  if (!keep && from.dtype != DType::f16) return quantize(kernels, from, into);
  auto* rows = keep ? reinterpret_cast<bf16_t*>(into.codes) : scratch.take<bf16_t>(from.rows * from.cols);
  round_rows(kernels.decode, from, rows);
  return keep ? QuantError{} : quantize(kernels, view(rows, DType::bf16, from.rows, from.cols), into);
}

// What the source tells of a layer, as if it had these experts alone.
LayerInfo part_of(LayerInfo layer, int number, const std::optional<Range>& experts) {
  if (!experts) return layer;
  KT_CHECK(experts->begin >= 0 && experts->size() > 0 && experts->end <= layer.num_experts,
           "experts is range({}, {}), but layer {} has {} experts: wanted some of them", experts->begin,
           experts->end, number, layer.num_experts);
  layer.nbytes = layer.nbytes / to_size(layer.num_experts) * to_size(experts->size());
  layer.num_experts = to_int(experts->size());
  return layer;
}

// Gives a layer memory of its own, and what `fill` writes there; it returns the errors of quantising.
template <class FillBlocks>
void load_to_memory(const Runtime& runtime, ExpertWeights& weights, Storage& storage,
                    const FillBlocks& fill) {
  storage.own = std::make_shared<LayerMemory>(runtime, weights, weights);
  storage.errors = fill(storage.own->blocks());
  weights.weights = weights_in(storage.own->blocks());
}

void read_ahead(const std::byte* bytes, index_t count) {
  if (count == 0) return;
  static const auto page = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
  const auto begin = reinterpret_cast<std::uintptr_t>(bytes), first = begin / page * page;
  ::madvise(reinterpret_cast<void*>(first), begin + static_cast<std::uintptr_t>(count) - first,
            MADV_WILLNEED);
}

// Weights that are mapped from a file: `fetch` asks the operating system for those of an expert.
void page_in(ExpertWeights& layer) {
  layer.fetch = [weights = layer.weights](int expert) {
    for (const auto& stack : weights) {
      const Weight& w = stack[to_size(expert)];
      read_ahead(w.codes, w.codes_bytes());
      read_ahead(w.scales, w.scales_bytes());
      read_ahead(w.zeros, w.zeros_bytes());
      read_ahead(w.global_scale, w.global_scale_bytes());
    }
  };
}

// Keeps the disk busy with the matrices behind those that are being read: a single read waits for its own.
class ReadAhead {
 public:
  // first: the number that expert 0 of `order` has in the source.
  ReadAhead(const LayerSource& source, const std::vector<Matrix>& order, int first)
      : source_(source), order_(order), first_(first) {
    constexpr std::uint64_t kBytesAhead = 64 << 20;
    for (std::uint64_t bytes = 0; asked_ < order.size() && bytes < kBytesAhead;) bytes += ask(asked_++);
  }

  // A matrix is begun, and another one comes within reach.
  void advance() {
    if (const std::size_t next = asked_++; next < order_.size()) ask(next);
  }

 private:
  std::uint64_t ask(std::size_t i) const {
    const LayerSource::Stretch stretch = source_.stretch(first_ + order_[i].expert, order_[i].projection);
    source_.read_ahead(stretch);
    return stretch.bytes;
  }

  const LayerSource& source_;
  const std::vector<Matrix>& order_;
  int first_;
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
        first_(options.experts ? to_int(options.experts->begin) : 0),
        info_(part_of(source_->info(), layer, options.experts)),
        weights_{info_, {}, options.activation} {
    for (const Projection p : projections_of(info_.gated))
      if (WeightType& type = weights_.types[index_of(p)]; options.format && *options.format != type.format) {
        type = traits_of(*options.format).quantized;
        convert_ = true;
      }
    static_cast<Sharding&>(weights_) = divide(weights_, *runtime_, options_.sharding);
  }

  std::shared_ptr<Experts> load() {
    KT_CHECK(!options_.paged || !options_.cache_dir,
             "paged leaves the weights in the checkpoint's files, cache_dir puts them into packed ones: "
             "wanted one of them");
    index_->checkpoint().check_unchanged();
    KT_CHECK(
        !options_.shared_dir || (!options_.paged && !options_.cache_dir),
        "shared keeps the weights in memory, paged and cache_dir leave them in files: wanted one of them");
    if (options_.paged) {
      map();
    } else if (options_.cache_dir) {
      map_packed();
    } else if (options_.shared_dir) {
      map_shared();
    } else {
      load_all();
    }
    if (info_.biases) storage_.biases = biases();
    return std::make_shared<Experts>(runtime_, std::move(weights_), std::move(storage_));
  }

 private:
  bool quantizes() const { return convert_ && *options_.format != Format::bf16; }

  std::array<std::vector<bf16_t>, 3> biases() const {
    std::array<std::vector<bf16_t>, 3> result;
    for (const Projection p : projections_of(info_.gated))
      result[index_of(p)].resize(to_size(info_.num_experts * info_.rows(p)));
    Runtime::Lease lease(*runtime_);
    lease.parallel_for(info_.num_experts, [&](index_t expert, Arena& scratch) {
      for (const Projection p : projections_of(info_.gated))
        source_->read_bias(first_ + to_int(expert), p, result[index_of(p)].data() + expert * info_.rows(p),
                           scratch, lease.kernels().decode);
    });
    return result;
  }

  void load_all() {
    load_to_memory(*runtime_, weights_, storage_,
                   [this](std::span<const LayerBlock> blocks) { return fill(blocks); });
  }

  // Checked as if it were read: the pages of its scales are.
  void map() {
    KT_CHECK(!convert_, "format is \"{}\", paged needs the one in the files: \"{}\"",
             name_of(*options_.format), name_of(info_.types.back().format));
    storage_.checkpoint = index_;
    for (const Projection p : projections_of(info_.gated))
      weights_.weights[index_of(p)].resize(to_size(info_.num_experts));
    {
      Runtime::Lease lease(*runtime_);
      lease.parallel_for(info_.num_experts, [&](index_t expert, Arena&) {
        for (const Projection p : projections_of(info_.gated))
          weights_.weights[index_of(p)][to_size(expert)] = source_->map(first_ + to_int(expert), p);
      });
    }
    if (report_) report_(info_.nbytes);
    page_in(weights_);
  }

  void map_packed() {
    const fs::path path = packed_path();
    const PackedLayer wanted = wanted_layer();
    std::string why;
    auto file = PackedFile::open(path, wanted, why);
    if (!why.empty() && options_.warn)
      options_.warn(message("{}: ignored and made again: {}", quote(path.native()), why));
    if (file == nullptr) file = pack(path, wanted);
    use(std::move(file));
    page_in(weights_);
  }

  void map_shared() {
    const PackedLayer wanted = wanted_layer();
    SharedLayer shared(*options_.shared_dir, message("{}-{}", wanted.source, file_name()), report_);
    std::string why;
    auto file = shared.find(wanted, why);
    if (file == nullptr && !why.empty() && options_.warn)
      options_.warn(message("another process has layer {} in memory that cannot be shared: {}", layer_, why));
    if (file == nullptr) {
      PackedLayer layer = wanted;
      layer.errors = fill(std::array{LayerBlock::whole(weights_, shared.reserve(wanted))});
      packed_ = info_.nbytes;
      file = shared.commit(layer, *runtime_, report_);
    }
    use(std::move(file));
    storage_.shared = true;
  }

  PackedLayer wanted_layer() const {
    PackedLayer wanted{weights_, index_->checkpoint().fingerprint()};
    if (quantizes()) wanted.errors.emplace();
    return wanted;
  }

  void use(std::shared_ptr<const PackedFile> file) {
    if (report_) report_(info_.nbytes - packed_);
    // Of a mapping for reading: nobody writes there.
    const std::array blocks{LayerBlock::whole(weights_, const_cast<std::byte*>(file->weights()))};
    weights_.weights = weights_in(blocks);
    storage_.errors = file->layer().errors;
    storage_.packed = std::move(file);
  }

  std::shared_ptr<const PackedFile> pack(const fs::path& path, PackedLayer layer) {
    std::string why;
    PackedWriter writer(path, weights_, report_);
    if (auto file = PackedFile::open(path, layer, why)) return file;  // another process made it meanwhile
    layer.errors = fill(std::array{LayerBlock::whole(weights_, writer.reserve())});
    packed_ = info_.nbytes;
    writer.commit(layer, *runtime_, report_);
    auto file = PackedFile::open(path, layer, why);
    if (file == nullptr)
      throw IoError(message("{}: cannot be read after it was written: {}", quote(path.native()), why));
    return file;
  }

  // One folder a checkpoint, told apart by where it is.
  fs::path packed_path() const {
    const fs::path from = fs::weakly_canonical(index_->checkpoint().path());
    const std::string& text = from.native();
    constexpr std::size_t kMostName = 200;  // of the 255 bytes a name may have
    return *options_.cache_dir /
           message("{}-{}", from.filename().native().substr(0, kMostName), checksum(text)) / file_name();
  }

  std::string file_name() const {
    std::string tag = index_->tag(layer_);
    if (const auto& part = options_.experts; part)
      tag += message("{}experts-{}-{}", tag.empty() ? "" : "-", part->begin, part->end);
    return message("layer-{}{}{}.{}.ktmoe", layer_, tag.empty() ? "" : "-", tag,
                   name_of(weights_.types.back().format));
  }

  // Returns the errors of quantising, if the weights are quantised.
  std::optional<QuantErrors> fill(std::span<const LayerBlock> blocks) {
    const std::vector<Matrix> order = as_stored();
    ReadAhead ahead(*source_, order, first_);
    const QuantErrors errors = fill_all(
        *runtime_, weights_, blocks, order, info_.nbytes,
        [&](const Matrix& m, const MutableWeight& into, const KernelSet& kernels, Arena& scratch) {
          ahead.advance();
          MutableWeight stored = into;
          stored.type = info_.types[index_of(m.projection)];
          const bool convert_it = stored.type != into.type;
          if (convert_it) stored = in_scratch(stored, scratch);
          source_->read(first_ + m.expert, m.projection, stored, scratch, kernels.decode);
          if (!convert_it) return QuantError{};
          const Weight w = frozen(stored);
          try {
            return convert(kernels, in_bf16(kernels, whole(w), scratch), into, scratch);
          } catch (const ValueError& error) {
            throw ValueError(message("{}: layer {}: {} of expert {}: {}",
                                     quote(index_->checkpoint().path().native()), layer_,
                                     name_of(m.projection), first_ + m.expert, error.what()));
          }
        },
        report_);
    index_->checkpoint().check_unchanged();  // what was read belongs together
    return quantizes() ? std::optional(errors) : std::nullopt;
  }

  // All matrices in the order in which the files have them.
  std::vector<Matrix> as_stored() const {
    std::vector<Matrix> order = matrices_of(weights_);
    std::ranges::stable_sort(order, {}, [&](const Matrix& m) {
      const auto [entry, begin, bytes] = source_->stretch(first_ + m.expert, m.projection);
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
  int first_;  // the number that the first expert has in the checkpoint
  LayerInfo info_;
  ExpertWeights weights_;
  Storage storage_;
  bool convert_ = false;
  std::size_t packed_ = 0;  // bytes already reported as read
};

}  // namespace

std::shared_ptr<Experts> experts_from_matrices(std::shared_ptr<Runtime> runtime, const LayerShape& layer,
                                               Activation activation, const Matrices& matrices,
                                               const Biases& biases, const ShardingOptions& sharding) {
  const Fill fill = [&](const Matrix& m, const MutableWeight& into, const KernelSet& kernels,
                        Arena& scratch) {
    try {
      return convert(kernels, matrices(m.expert, m.projection), into, scratch);
    } catch (const ValueError& error) {
      throw ValueError(message("{}: expert {}: {}", name_of(m.projection), m.expert, error.what()));
    }
  };
  ExpertWeights weights{layer, divide(layer, *runtime, sharding), activation};
  Storage storage;
  load_to_memory(*runtime, weights, storage, [&](std::span<const LayerBlock> blocks) {
    return fill_all(*runtime, layer, blocks, matrices_of(layer), 0, fill, {});
  });
  if (layer.types.back().format == Format::bf16) storage.errors.reset();
  for (const Projection p : projections) storage.biases[index_of(p)] = rounded(*runtime, biases[index_of(p)]);
  return std::make_shared<Experts>(std::move(runtime), std::move(weights), std::move(storage));
}

std::shared_ptr<Experts> experts_from_checkpoint(std::shared_ptr<Runtime> runtime,
                                                 std::shared_ptr<const ExpertIndex> index, int layer,
                                                 const LoadOptions& options, const Report& report) {
  return CheckpointLayer(std::move(runtime), std::move(index), layer, options, report).load();
}

}  // namespace kt
