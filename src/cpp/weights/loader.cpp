#include "weights/loader.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <thread>
#include <tuple>
#include <utility>

#include "base/error.h"
#include "gemm/decode.h"
#include "weights/checksum.h"
#include "weights/packed_file.h"
#include "weights/text.h"

namespace kt {
namespace fs = std::filesystem;
namespace {

// Writes one matrix; called by several threads at once, each with scratch that is empty at first.
using Fill = std::function<void(int expert, Projection p, const MutableWeight& into, const KernelSet& kernels,
                                Arena& scratch)>;

std::size_t task_of(int expert, Projection p) {
  return static_cast<std::size_t>(expert) * projections.size() + index_of(p);
}

struct Matrix {
  int expert;
  Projection projection;
};

// Expert by expert.
std::vector<Matrix> matrices_of(const LayerPlan& plan) {
  std::vector<Matrix> all;
  for (int e = 0; e < plan.num_experts; ++e)
    for (const Projection p : projections) all.push_back({e, p});
  return all;
}

// In the given order. `nbytes` is what is reported in the end.
void fill_all(Runtime& runtime, const LayerPlan& plan, std::byte* memory, const std::vector<Matrix>& order,
              std::size_t nbytes, const Fill& fill, const Report& report) {
  const std::size_t tasks = order.size();
  std::atomic<std::size_t> done{0};
  std::size_t reported = 0;  // the caller's alone
  const auto tell = [&] {
    const std::size_t now = nbytes / tasks * done + (done == tasks ? nbytes % tasks : 0);
    report(now - std::exchange(reported, now));
  };
  const auto caller = std::this_thread::get_id();
  Runtime::Lease lease(runtime);
  lease.parallel_for(static_cast<index_t>(tasks), [&](index_t task, Arena& scratch) {
    const auto [expert, p] = order[static_cast<std::size_t>(task)];
    fill(expert, p, plan.at(memory, expert, p), lease.kernels(), scratch);
    ++done;
    if (report && std::this_thread::get_id() == caller) tell();
  });
  if (report) tell();
}

Weight frozen(const MutableWeight& w) { return {w.type, w.rows, w.cols, w.codes, w.scales, w.zeros}; }

Placed place(const LayerPlan& plan, std::byte* memory, std::shared_ptr<const void> owner) {
  Placed placed;
  placed.memory = std::move(owner);
  for (int e = 0; e < plan.num_experts; ++e)
    for (const Projection p : projections)
      placed.weights[index_of(p)].push_back(frozen(plan.at(memory, e, p)));
  return placed;
}

// Tells the kernel that these bytes of a mapping are wanted soon.
void read_ahead(const std::byte* bytes, index_t count) {
  static const auto page = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
  const auto begin = reinterpret_cast<std::uintptr_t>(bytes), first = begin / page * page;
  ::madvise(reinterpret_cast<void*>(first), begin + static_cast<std::uintptr_t>(count) - first,
            MADV_WILLNEED);
}

void page_in(Placed& placed) {
  placed.mapped = true;
  placed.fetch = [weights = placed.weights](int expert) {
    for (const auto& stack : weights) {
      const Weight& w = stack[static_cast<std::size_t>(expert)];
      read_ahead(w.codes, w.codes_bytes());
      if (w.scales_bytes() > 0) read_ahead(w.scales, w.scales_bytes());
    }
  };
}

template <class T>
T* scratch_for(index_t bytes, Arena& scratch) {
  return bytes == 0 ? nullptr : scratch.take<T>(bytes);
}

// A matrix without memory gets some.
MutableWeight in_scratch(MutableWeight w, Arena& scratch) {
  w.codes = scratch.take<std::byte>(w.codes_bytes());
  w.scales = scratch_for<std::byte>(w.scales_bytes(), scratch);
  w.zeros = scratch_for<std::byte>(w.zeros_bytes(), scratch);
  return w;
}

// A bf16, fp16 or fp32 matrix in the type of `into`.
QuantError convert(const KernelSet& kernels, const MatView& from, const MutableWeight& into, Arena& scratch) {
  const bool keep = into.type.format == Format::bf16;
  if (!keep && from.dtype != DType::f16) return quantize(kernels, from, into);
  auto* rows = keep ? reinterpret_cast<bf16_t*>(into.codes) : scratch.take<bf16_t>(from.rows * from.cols);
  for (index_t i = 0; i < from.rows; ++i)
    round_row(kernels.decode, from.dtype, from.cols, static_cast<const std::byte*>(from.at(i, 0)),
              rows + i * from.cols);
  return keep ? QuantError{} : quantize(kernels, view(rows, DType::bf16, from.rows, from.cols), into);
}

// A dense matrix in bf16, row by row; nothing of one without data.
std::vector<bf16_t> rounded(Runtime& runtime, const MatView& from) {
  if (from.data == nullptr) return {};
  std::vector<bf16_t> rows(static_cast<std::size_t>(from.rows * from.cols));
  const Runtime::Lease lease(runtime);
  for (index_t i = 0; i < from.rows; ++i)
    round_row(lease.kernels().decode, from.dtype, from.cols, static_cast<const std::byte*>(from.at(i, 0)),
              rows.data() + i * from.cols);
  return rows;
}

// Another number when a file of the checkpoint has changed; a faithful copy of the directory has the same.
std::uint64_t fingerprint(const Checkpoint& checkpoint) {
  std::string text;
  for (const DataFile& file : checkpoint.files())
    text += message("{} {} {}\n", file.path().filename().native(), file.stamp().size, file.stamp().mtime_ns);
  return checksum(std::as_bytes(std::span(text)));
}

// Errors of all experts, added in order.
std::array<QuantError, 3> sum_errors(const std::vector<QuantError>& each) {
  std::array<QuantError, 3> sums{};
  for (std::size_t i = 0; i < each.size(); ++i) {
    sums[i % sums.size()].error += each[i].error;
    sums[i % sums.size()].norm += each[i].norm;
  }
  return sums;
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
        type = default_type(*options.format);
        convert_ = true;
      }
  }

  std::shared_ptr<Experts> load() {
    KT_CHECK(!options_.paged || !options_.cache_dir,
             "paged leaves the weights in the checkpoint's files, cache_dir puts them into packed ones: "
             "wanted one "
             "of them");
    Placed placed = options_.paged ? mapped() : options_.cache_dir ? packed() : in_memory();
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

  Placed in_memory() {
    const auto memory = std::make_shared<Buffer>(static_cast<std::size_t>(plan_.bytes()));
    auto* bytes = static_cast<std::byte*>(memory->data());
    const std::array<QuantError, 3> errors = fill(bytes);
    Placed placed = place(plan_, bytes, memory);
    placed.quantized = quantizes();
    placed.errors = errors;
    return placed;
  }

  Placed mapped() {
    KT_CHECK(!convert_, "format is \"{}\", paged needs the one in the files: \"{}\"",
             name_of(*options_.format), name_of(info_.types.front().format));
    Placed placed;
    placed.memory = index_;
    for (int e = 0; e < plan_.num_experts; ++e)
      for (const Projection p : projections) placed.weights[index_of(p)].push_back(source_->map(e, p));
    page_in(placed);
    return placed;
  }

  Placed packed() {
    PackedLayer wanted{plan_, fingerprint(index_->checkpoint()), quantizes(), {}};
    const fs::path path = packed_path();
    std::string why;
    auto file = PackedFile::open(path, wanted, why);
    if (!why.empty() && options_.warn)
      options_.warn(message("{}: ignored and made again: {}", quote(path.native()), why));
    if (file != nullptr && report_) report_(info_.nbytes);
    if (file == nullptr) {
      PackedWriter writer(path, plan_);
      file = PackedFile::open(path, wanted, why);  // another process may have made it meanwhile
      if (file == nullptr) {
        wanted.errors = fill(writer.weights());
        writer.commit(wanted, *runtime_);
        file = PackedFile::open(path, wanted, why);
      }
      if (file == nullptr)
        throw IoError(message("{}: cannot be read after it was written: {}", quote(path.native()), why));
    }
    Placed placed = place(plan_, const_cast<std::byte*>(file->weights()), file);
    placed.quantized = file->layer().quantized;
    placed.errors = file->layer().errors;
    placed.verify = [file](Runtime& runtime) { return file->verify(runtime); };
    page_in(placed);
    return placed;
  }

  // One folder a checkpoint, told apart by where it is.
  fs::path packed_path() const {
    const fs::path from = fs::weakly_canonical(index_->checkpoint().path());
    const std::string& text = from.native();
    return *options_.cache_dir /
           message("{}-{}", from.filename().native(), checksum(std::as_bytes(std::span(text)))) /
           message("layer-{}.{}.ktmoe", layer_, name_of(plan_.types.front().format));
  }

  std::array<QuantError, 3> fill(std::byte* memory) {
    std::vector<QuantError> errors(static_cast<std::size_t>(plan_.num_experts) * projections.size());
    const std::vector<Matrix> order = as_stored();
    ReadAhead ahead(*source_, order);
    fill_all(
        *runtime_, plan_, memory, order, info_.nbytes,
        [&](int expert, Projection p, const MutableWeight& into, const KernelSet& kernels, Arena& scratch) {
          ahead.advance();
          MutableWeight stored = into;
          stored.type = info_.types[index_of(p)];
          if (stored.type == into.type) return source_->read(expert, p, into, scratch, kernels.decode);
          stored = in_scratch(stored, scratch);
          source_->read(expert, p, stored, scratch, kernels.decode);
          const Weight w = frozen(stored);
          const MatView decoded = in_bf16(kernels, whole(w), scratch);
          errors[task_of(expert, p)] = convert(kernels, decoded, into, scratch);
        },
        report_);
    return sum_errors(errors);
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
  bool convert_ = false;
};

}  // namespace

std::shared_ptr<Experts> experts_from_matrices(std::shared_ptr<Runtime> runtime, const LayerPlan& plan,
                                               Activation activation, const Matrices& matrices,
                                               const Biases& biases) {
  const auto memory = std::make_shared<Buffer>(static_cast<std::size_t>(plan.bytes()));
  auto* bytes = static_cast<std::byte*>(memory->data());
  std::vector<QuantError> errors(static_cast<std::size_t>(plan.num_experts) * projections.size());
  fill_all(
      *runtime, plan, bytes, matrices_of(plan), 0,
      [&](int expert, Projection p, const MutableWeight& into, const KernelSet& kernels, Arena& scratch) {
        try {
          errors[task_of(expert, p)] = convert(kernels, matrices(expert, p), into, scratch);
        } catch (const ValueError& error) {
          throw ValueError(message("{}: expert {}: {}", name_of(p), expert, error.what()));
        }
      },
      {});
  Placed placed = place(plan, bytes, memory);
  placed.quantized = plan.types.front().format != Format::bf16;
  placed.errors = sum_errors(errors);
  for (const Projection p : projections) placed.biases[index_of(p)] = rounded(*runtime, biases[index_of(p)]);
  return std::make_shared<Experts>(std::move(runtime), plan, activation, std::move(placed));
}

std::shared_ptr<Experts> experts_from_checkpoint(std::shared_ptr<Runtime> runtime,
                                                 std::shared_ptr<const ExpertIndex> index, int layer,
                                                 const LoadOptions& options, const Report& report) {
  return CheckpointLayer(std::move(runtime), std::move(index), layer, options, report).load();
}

}  // namespace kt
