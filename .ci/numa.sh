#!/usr/bin/env bash
# The tests of several memory nodes on machines that have them: Debian's kernel in QEMU, without hardware
# virtualisation. Such a machine sees this one's files, read-only. `numa.sh VENV`, after `make build` there
# and the C++ tests' build.
set -euo pipefail
venv=$(readlink -f "$1")
cd "$(dirname "$0")/.."
vm=$PWD/build/vm
modules=(virtio_ring virtio virtio_pci_modern_dev virtio_pci_legacy_dev virtio_pci netfs fscache 9pnet 9pnet_virtio 9p)
gigabytes=3  # of a node
memory() { for id in "$@"; do echo "-object memory-backend-ram,id=m$id,size=${gigabytes}G"; done; }
declare -A machines=(
  ["two sockets"]="$(memory 0 1)
    -numa node,nodeid=0,cpus=0-1,memdev=m0 -numa node,nodeid=1,cpus=2-3,memdev=m1 -numa dist,src=0,dst=1,val=21"
  ["a node without memory, one without CPUs"]="$(memory 0 1 3)
    -numa node,nodeid=0,cpus=0,memdev=m0 -numa node,nodeid=1,cpus=1-2,memdev=m1
    -numa node,nodeid=2,cpus=3 -numa node,nodeid=3,memdev=m3"
)

# The kernel's package is unpacked, not installed.
fetch_kernel() {
  [ -e "$vm"/package/boot ] && return
  mkdir -p "$vm"/package
  local name
  name=$(apt-cache depends linux-image-amd64 | awk '/Depends: linux-image/ { print $2 }')
  (cd "$vm" && apt-get download -qq "$name" && dpkg -x "$name"_*.deb package)
}

make_initrd() {
  rm -rf "$vm"/initrd
  mkdir -p "$vm"/initrd/{bin,modules,mnt,proc,sys,dev}
  cp "$(command -v busybox)" "$vm"/initrd/bin/
  for module in "${modules[@]}"; do
    cp "$(find "$vm"/package/lib/modules -name "$module.ko")" "$vm"/initrd/modules/
  done
  cat >"$vm"/initrd/init <<END
#!/bin/busybox sh
b=/bin/busybox
\$b mount -t proc p /proc && \$b mount -t sysfs s /sys && \$b mount -t devtmpfs d /dev
for module in ${modules[*]}; do \$b insmod /modules/\$module.ko; done
\$b mount -t 9p -o trans=virtio,version=9p2000.L,ro,msize=1048576,cache=loose root /mnt
for d in proc sys dev; do \$b mount -o bind /\$d /mnt/\$d; done
\$b mount -t tmpfs t /mnt/mnt
\$b chroot /mnt /bin/bash $vm/tests.sh && echo "numa.sh: passed"
\$b poweroff -f
END
  chmod +x "$vm"/initrd/init
  (cd "$vm"/initrd && find . | cpio -o -H newc --quiet) | gzip -1 >"$vm"/initrd.gz
  cat >"$vm"/tests.sh <<END
set -e
export PATH=$venv/bin:/usr/bin:/bin HOME=/mnt TMPDIR=/mnt XDG_CACHE_HOME=/mnt HYPOTHESIS_STORAGE_DIRECTORY=/mnt
export PYTHONDONTWRITEBYTECODE=1 OMP_WAIT_POLICY=passive
echo 0 >/proc/sys/kernel/numa_balancing  # it moves pages away
cp -r $PWD/tests $PWD/pyproject.toml /mnt
test -d /sys/devices/system/node/node1
for test in layout worker_pool task_graph placed moe; do $PWD/build/cpp/tests/cpp/\${test}_test -m; done
kt-moe doctor || true  # which says what such a machine lacks
cd /mnt
python -m pytest -q -p no:cacheprovider tests/py/test_several_nodes.py tests/py/test_shards_in_memory.py
END
}

fetch_kernel
make_initrd
failed=0
for machine in "${!machines[@]}"; do
  echo "== $machine"
  log="$vm/${machine// /-}.log"
  nodes=$(grep -o memory-backend <<<"${machines[$machine]}" | wc -l)
  # shellcheck disable=SC2086
  timeout 1200 qemu-system-x86_64 -accel tcg,thread=multi -cpu max -nographic -no-reboot -M q35 -m $((gigabytes * nodes))G -smp 4,sockets=2 \
    ${machines[$machine]} -kernel "$vm"/package/boot/vmlinuz-* -initrd "$vm"/initrd.gz \
    -append "console=ttyS0 quiet panic=-1" -device virtio-9p-pci,fsdev=root,mount_tag=root \
    -fsdev local,id=root,path=/,security_model=none,readonly=on,multidevs=remap </dev/null | tee "$log" || true
  grep -q "numa.sh: passed" "$log" || { echo "== failed: $machine" >&2; failed=1; }
done
exit $failed
