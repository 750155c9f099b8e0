# SPDX-License-Identifier: Apache-2.0
"""``[hypervisor.NAME]``: the virtual machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .keys import SAME_NAME, U32, U63, UNSET, Section, Support, key

NO, INERT, REFUSED = Support.NO, Support.INERT, Support.REFUSED
VFIO_PORTS = ("no-port", "bridge-port", "root-port", "switch-port")

MIN_MEMORY_MIB = 64
MAX_MEMORY_MIB = 16 << 20
MAX_VCPUS = 240


class HypervisorConfig(Section):
    """One VMM's section.  Paths are absolute; None stands for an empty text in the file."""

    name: str = "qemu"

    # The VMM and what it boots.
    path: Path = key(
        Path("/usr/bin/qemu-system-x86_64"),
        "the VMM program",
        annotation=SAME_NAME,
        allowed_by="valid_hypervisor_paths",
        sample=True,
    )
    valid_hypervisor_paths: tuple[str, ...] = key(
        (), "globs of programs that the annotation `path` may name", sample=True
    )
    jailer_path: Path | None = key(
        None,
        "Firecracker's jailer",
        annotation=SAME_NAME,
        allowed_by="valid_jailer_paths",
        vmms="F",
    )
    valid_jailer_paths: tuple[str, ...] = key(
        (), "globs for the annotation `jailer_path`", vmms="F"
    )
    ctlpath: Path | None = key(None, "the VMM's control program", support=INERT)
    valid_ctlpaths: tuple[str, ...] = key((), "globs for `ctlpath`", support=INERT)
    kernel: Path = key(
        UNSET,
        "the guest's kernel: an ELF vmlinux (PVH) or a bzImage; empty means the installed one",
        annotation=SAME_NAME,
        sample=True,
    )
    image: Path | None = key(
        None,
        "the guest's root disk, read-only; not together with `initrd`",
        annotation=SAME_NAME,
        sample=True,
    )
    initrd: Path | None = key(
        None, "the guest's initrd; not together with `image`", annotation=SAME_NAME, sample=True
    )
    modules_initrd: Path | None = key(
        None,
        "an initrd that loads the kernel's modules and then mounts the image; not needed by a "
        "kernel with its drivers built in",
        own=True,
        sample=True,
    )
    rootfs_type: str = key(
        "ext4",
        "file system on the image's first partition",
        choices=("ext4", "xfs", "erofs"),
        sample=True,
    )
    vm_rootfs_driver: str = key(
        "", "how the image is attached; chosen by the driver", support=INERT
    )
    firmware: Path | None = key(None, "firmware blob", annotation=SAME_NAME)
    firmware_volume: Path | None = key(
        None, "variables volume of split firmware", annotation=SAME_NAME, vmms="Q", support=NO
    )
    pflashes: tuple[str, ...] = key((), "pflash image files", vmms="Q", support=NO)
    kernel_params: str = key(
        "",
        "kernel parameters, appended last so that they win",
        annotation=SAME_NAME,
        sample=True,
    )
    kernel_verity_params: str = key(
        "", "dm-verity of the image", annotation=SAME_NAME, support=REFUSED
    )
    machine_type: str = key(
        "q35",
        "machine model",
        choices=("", "q35"),
        foreign=("pc", "microvm", "virt", "pseries", "s390-ccw-virtio"),
        annotation=SAME_NAME,
        vmms="QC",
        sample=True,
    )
    machine_accelerators: str = key(
        "", "options appended to the machine, separated by commas", annotation=SAME_NAME, vmms="QC"
    )
    cpu_features: str = key(
        "",
        "options appended to the CPU model, separated by commas",
        annotation=SAME_NAME,
        vmms="Q",
        sample=True,
    )
    accelerator: str = key(
        "auto",
        "what executes the guest: `auto` takes KVM where it really works, else emulation (TCG)",
        choices=("auto", "kvm", "tcg"),
        own=True,
        sample=True,
    )
    vsock: str = key(
        "auto",
        "the channel to the guest; `auto` takes the kernel's vhost-vsock, else the VMM's own, "
        "else our vhost-user device; `serial` is for guests without vsock",
        choices=("auto", "vhost", "vhost-user", "hybrid", "serial"),
        own=True,
        sample=True,
    )
    seccompsandbox: str = key(
        "",
        "value of QEMU's -sandbox; empty means everything denied that can be",
        aliases=("seccomp_sandbox",),
        vmms="Q",
        sample=True,
    )

    # CPUs and memory.
    default_vcpus: float = key(
        1.0,
        "vCPUs at boot, rounded up; 0 means 1, negative or more than the host has means all",
        unit="vCPU",
        annotation=SAME_NAME,
        sample=True,
    )
    default_maxvcpus: int = key(
        0,
        "how far vCPUs can be added; 0 means as many as the host has",
        unit="vCPU",
        low=0,
        high=U32,
        annotation="default_max_vcpus",
        sample=True,
    )
    default_bridges: int = key(1, "PCI bridges for hot-plug", low=0, high=5, support=INERT)
    default_memory: int = key(
        2048,
        "memory at boot; 0 means 2048",
        unit="MiB",
        low=0,
        high=MAX_MEMORY_MIB,
        annotation=SAME_NAME,
        sample=True,
    )
    memory_slots: int = key(
        10, "how often memory can be added", low=0, high=255, annotation=SAME_NAME, sample=True
    )
    default_maxmemory: int = key(
        0,
        "how far memory can be added; 0 means as much as the host has",
        unit="MiB",
        low=0,
        high=U63,
        sample=True,
    )
    memory_offset: int = key(
        0,
        "address space beyond memory, for NVDIMMs",
        unit="MiB",
        low=0,
        high=MAX_MEMORY_MIB,
        annotation=SAME_NAME,
        vmms="QC",
        support=INERT,
    )
    enable_virtio_mem: bool = key(
        False,
        "memory comes and goes by virtio-mem; without it it only comes, by DIMMs",
        annotation=SAME_NAME,
        vmms="QC",
    )
    enable_mem_prealloc: bool = key(
        False, "allocate all memory at boot", annotation=SAME_NAME, vmms="QC", sample=True
    )
    enable_hugepages: bool = key(
        False, "back memory by huge pages", annotation=SAME_NAME, sample=True
    )
    hugepage_type: str = key(
        "hugetlbfs",
        "kind of huge pages",
        choices=("hugetlbfs", "thp"),
        annotation=SAME_NAME,
        support=NO,
    )
    reclaim_guest_freed_memory: bool = key(
        False,
        "give memory that the guest freed back to the host (free page reporting)",
        annotation=SAME_NAME,
        vmms="QC",
        sample=True,
    )
    enable_guest_swap: bool = key(
        False,
        "swap disks in the guest, for containers whose annotations ask for it",
        annotation=SAME_NAME,
        vmms="Q",
    )
    guest_swap_path: str = key(
        "/run/kata-containers/swap", "directory of the swap files, which have no name there"
    )
    guest_swap_size_percent: int = key(
        100, "size of the swap", unit="%", low=0, high=1000, support=NO
    )
    guest_swap_create_threshold_secs: int = key(
        60, "age before a swap is made", unit="s", low=0, high=U32, support=NO
    )
    enable_iommu: bool = key(False, "virtual IOMMU", annotation=SAME_NAME, vmms="QC", support=NO)
    enable_iommu_platform: bool = key(
        False, "virtio devices behind the IOMMU", annotation=SAME_NAME, vmms="Q", support=NO
    )
    enable_numa: bool = key(False, "the host's NUMA nodes in the guest", vmms="Q", support=NO)
    numa_mapping: tuple[str, ...] = key(
        (),
        "host nodes of each guest node",
        annotation=SAME_NAME,
        separator=" ",
        vmms="Q",
        support=NO,
    )
    overhead_vcpus: float = key(
        0.0, "the VMM's share in static sizing", unit="vCPU", low=0, support=NO
    )
    overhead_memory: int = key(
        0, "the VMM's share in static sizing", unit="MiB", low=0, high=MAX_MEMORY_MIB, support=NO
    )
    disable_nested_virtualization: bool = key(False, "hide vmx and svm from the guest", support=NO)

    # Disks.
    block_device_driver: str = key(
        "virtio-blk",
        "driver of plugged disks; virtio-blk takes a PCI slot for each",
        choices=("virtio-blk", "virtio-scsi"),
        foreign=("virtio-mmio", "nvdimm", "virtio-blk-ccw"),
        synonyms={
            "virtio-blk-pci": "virtio-blk",
            "virtio-blk-mmio": "virtio-mmio",
            "virtio-pmem": "nvdimm",
        },
        annotation=SAME_NAME,
        sample=True,
    )
    block_device_aio: str = key(
        "threads",
        "how QEMU does disk I/O",
        choices=("threads", "native", "io_uring"),
        annotation=SAME_NAME,
        vmms="Q",
        sample=True,
    )
    block_device_cache_set: bool = key(False, "apply the next two", annotation=SAME_NAME, vmms="QC")
    block_device_cache_direct: bool = key(
        False, "open disks with O_DIRECT", annotation=SAME_NAME, vmms="QC"
    )
    block_device_cache_noflush: bool = key(
        False, "ignore the guest's flushes", annotation=SAME_NAME, vmms="Q"
    )
    block_device_logical_sector_size: int = key(
        0,
        "logical sector size shown to the guest; 0 leaves it to the VMM",
        unit="bytes",
        low=0,
        high=65536,
        annotation="blk_logical_sector_size",
        vmms="Q",
    )
    block_device_physical_sector_size: int = key(
        0,
        "physical sector size shown to the guest; 0 leaves it to the VMM",
        unit="bytes",
        low=0,
        high=65536,
        annotation="blk_physical_sector_size",
        vmms="Q",
    )
    queue_size: int = key(
        128,
        "descriptors of a virtio-blk disk's queue",
        low=1,
        high=32768,
        annotation="block_device_queue_size",
    )
    num_queues: int = key(
        1,
        "queues of a virtio-blk disk",
        low=1,
        high=1024,
        annotation="block_device_num_queues",
    )
    disable_block_device_use: bool = key(
        False,
        "mount a root file system on the host and share it, also where it could be a disk",
        annotation=SAME_NAME,
        vmms="QC",
        sample=True,
    )
    disable_image_nvdimm: bool = key(
        False,
        "image as virtio-blk and not as NVDIMM (always so here)",
        annotation=SAME_NAME,
        vmms="QC",
        support=INERT,
    )
    enable_iothreads: bool = key(False, "an I/O thread for disks", annotation=SAME_NAME, support=NO)
    indep_iothreads: int = key(
        0, "further I/O threads for disks", low=0, high=50, annotation=SAME_NAME, support=NO
    )
    enable_vhost_user_store: bool = key(
        False, "vhost-user disks", annotation=SAME_NAME, vmms="Q", support=NO
    )
    vhost_user_store_path: Path | None = key(
        Path("/var/run/kata-containers/vhost-user/"),
        "where vhost-user disks lie",
        annotation=SAME_NAME,
        allowed_by="valid_vhost_user_store_paths",
        vmms="Q",
        support=NO,
    )
    valid_vhost_user_store_paths: tuple[str, ...] = key(
        (), "globs for the annotation `vhost_user_store_path`", vmms="Q", support=INERT
    )
    vhost_user_reconnect_timeout_sec: int = key(
        0,
        "delay before a vhost-user device is connected again",
        unit="s",
        low=0,
        high=U32,
        annotation=SAME_NAME,
        vmms="Q",
        support=NO,
    )

    # The shared file system.
    shared_fs: str = key(
        "virtio-fs",
        "how files reach the guest",
        choices=("virtio-fs", "none"),
        foreign=("virtio-fs-nydus", "virtio-9p", "inline-virtio-fs"),
        annotation=SAME_NAME,
        vmms="QC",
        sample=True,
    )
    virtio_fs_daemon: Path = key(
        UNSET,
        "the virtiofsd program, C or Rust; empty means the one found",
        annotation=SAME_NAME,
        allowed_by="valid_virtio_fs_daemon_paths",
        vmms="QC",
        sample=True,
    )
    valid_virtio_fs_daemon_paths: tuple[str, ...] = key(
        (), "globs for the annotation `virtio_fs_daemon`", vmms="QC", sample=True
    )
    virtio_fs_cache: str = key(
        "auto",
        "how long the guest may cache what it read",
        choices=("never", "metadata", "auto", "always"),
        synonyms={"none": "never", "": "auto"},
        annotation=SAME_NAME,
        vmms="QC",
        sample=True,
    )
    virtio_fs_cache_size: int = key(
        0,
        "DAX window",
        unit="MiB",
        low=0,
        high=MAX_MEMORY_MIB,
        annotation=SAME_NAME,
        vmms="QC",
        support=NO,
    )
    virtio_fs_is_dax: bool = key(False, "use a DAX window", support=NO)
    virtio_fs_queue_size: int = key(
        1024, "descriptors of the share's queue; 0 means 1024", low=0, high=1024, vmms="Q"
    )
    virtio_fs_extra_args: tuple[str, ...] = key(
        (),
        "further arguments of virtiofsd",
        annotation=SAME_NAME,
        separator="json",
        vmms="QC",
        sample=True,
    )
    msize_9p: int = key(
        8192,
        "9p message size",
        unit="bytes",
        low=1,
        high=U32,
        annotation=SAME_NAME,
        vmms="QC",
        support=INERT,
    )

    # Devices passed through.
    hot_plug_vfio: str = key(
        "no-port",
        "port for VFIO devices added later",
        choices=VFIO_PORTS,
        annotation=SAME_NAME,
        vmms="QC",
        support=NO,
    )
    cold_plug_vfio: str = key(
        "no-port",
        "port for VFIO devices there from the start",
        choices=VFIO_PORTS,
        annotation=SAME_NAME,
        vmms="QC",
        support=NO,
    )
    pcie_root_port: int = key(
        0, "PCIe root ports", low=0, high=16, annotation=SAME_NAME, vmms="QC", support=NO
    )
    pcie_switch_port: int = key(
        0, "PCIe switch ports", low=0, high=16, annotation=SAME_NAME, vmms="QC", support=NO
    )

    # Network and entropy.
    disable_vhost_net: bool = key(
        False,
        "network without the kernel's vhost-net",
        annotation=SAME_NAME,
        vmms="Q",
    )
    network_queues: int = key(
        1,
        "queue pairs of a network interface; it has at least as many as the VM has vCPUs",
        low=1,
        high=256,
        annotation=SAME_NAME,
    )
    rx_rate_limiter_max_rate: int = key(
        0,
        "limit of traffic into the VM; 0 means none",
        unit="bit/s",
        low=0,
        high=U63,
        annotation=SAME_NAME,
        vmms="QF",
    )
    tx_rate_limiter_max_rate: int = key(
        0,
        "limit of traffic out of the VM; 0 means none",
        unit="bit/s",
        low=0,
        high=U63,
        annotation=SAME_NAME,
        vmms="QF",
    )
    net_rate_limiter_bw_max_rate: int = key(
        0, "network token bucket", unit="bit/s", low=0, high=U63, vmms="C", support=NO
    )
    net_rate_limiter_bw_one_time_burst: int = key(
        0, "its first burst", unit="bit", low=0, high=U63, vmms="C", support=NO
    )
    net_rate_limiter_ops_max_rate: int = key(
        0, "network packets", unit="op/s", low=0, high=U63, vmms="C", support=NO
    )
    net_rate_limiter_ops_one_time_burst: int = key(
        0, "its first burst", unit="op", low=0, high=U63, vmms="C", support=NO
    )
    disk_rate_limiter_bw_max_rate: int = key(
        0,
        "bandwidth of each plugged disk; 0 means no limit",
        unit="bit/s",
        low=0,
        high=U63,
        vmms="QCF",
    )
    disk_rate_limiter_bw_one_time_burst: int = key(
        0, "what may pass at once after a pause", unit="bit", low=0, high=U63, vmms="QCF"
    )
    disk_rate_limiter_ops_max_rate: int = key(
        0,
        "operations of each plugged disk; 0 means no limit",
        unit="op/s",
        low=0,
        high=U63,
        vmms="QCF",
    )
    disk_rate_limiter_ops_one_time_burst: int = key(
        0, "what may pass at once after a pause", unit="op", low=0, high=U63, vmms="QCF"
    )
    entropy_source: Path = key(
        Path("/dev/urandom"),
        "host file behind the guest's random number device",
        annotation=SAME_NAME,
        allowed_by="valid_entropy_sources",
        sample=True,
    )
    valid_entropy_sources: tuple[str, ...] = key(
        (), "globs for the annotation `entropy_source`", sample=True
    )

    # Debugging and hardening.
    enable_debug: bool = key(
        False, "messages of the VMM and of the guest's kernel in the log", sample=True
    )
    hypervisor_loglevel: int = key(
        1, "how much the VMM says", low=0, high=3, vmms="QC", support=INERT
    )
    log_level: str = key("", "how much the VMM says", support=INERT)
    extra_monitor_socket: str = key(
        "",
        "a further monitor socket, with `enable_debug`",
        choices=("", "hmp", "qmp", "qmp-pretty"),
        aliases=("dbg_monitor_socket",),
        vmms="Q",
        support=NO,
    )
    use_legacy_serial: bool = key(
        False, "console on ttyS0", annotation=SAME_NAME, vmms="Q", support=NO
    )
    disable_nesting_checks: bool = key(False, "don't look whether the host is a VM", support=INERT)
    guest_memory_dump_path: str = key("", "dump memory here on a guest panic", vmms="Q", support=NO)
    guest_memory_dump_paging: bool = key(False, "paging in that dump", vmms="Q", support=NO)
    guest_hook_path: str = key(
        "", "directory of OCI hooks inside the guest", annotation=SAME_NAME, sample=True
    )
    rootless: bool = key(
        False, "the VMM as a user of its own", annotation=SAME_NAME, vmms="QC", support=REFUSED
    )
    rootless_user: Mapping[str, Any] | None = key(None, "that user", support=REFUSED)
    disable_seccomp: bool = key(False, "the VMM's own seccomp off", vmms="C", support=NO)
    disable_selinux: bool = key(False, "no SELinux label on the VMM", support=INERT)
    disable_guest_selinux: bool = key(
        True, "no SELinux in the guest (always so here)", vmms="QC", support=INERT
    )
    selinux_label: str = key("", "SELinux label of the guest's processes", support=NO)
    enable_annotations: tuple[str, ...] = key(
        (),
        "regular expressions: base names of hypervisor annotations that pods may use",
        sample=True,
    )

    # Confidential computing, and what else upstream's files have.
    confidential_guest: bool = key(
        False, "memory that the host can't read", vmms="QC", support=REFUSED
    )
    sev_snp_guest: bool = key(False, "SEV-SNP", vmms="Q", support=REFUSED)
    snp_id_block: str = key("", "SNP identity", vmms="Q", support=REFUSED)
    snp_id_auth: str = key("", "SNP identity", vmms="Q", support=REFUSED)
    snp_guest_policy: int | None = key(None, "SNP policy", low=0, high=U63, vmms="Q", support=INERT)
    measurement_algo: str = key("sha512", "digest of init data", vmms="QC", support=INERT)
    tdx_quote_generation_service_socket_port: int = key(
        0, "TDX quotes", low=0, high=U32, vmms="Q", support=INERT
    )
    initdata: str = key("", "init data of a confidential guest", support=REFUSED)
    guest_extension_images: tuple[Mapping[str, Any], ...] = key(
        (), "further read-only disks", vmms="Q", support=NO
    )
    remote_hypervisor_socket: str = key(
        "/run/peerpod/hypervisor.sock",
        "remote hypervisor",
        aliases=("hypervisor_socket",),
        vmms="R",
        support=NO,
    )
    remote_hypervisor_timeout: int = key(
        600,
        "remote hypervisor",
        unit="s",
        low=0,
        high=U32,
        aliases=("hypervisor_timeout",),
        vmms="R",
        support=NO,
    )
    default_gpus: int = key(
        0, "remote hypervisor", low=0, high=U32, annotation=SAME_NAME, vmms="R", support=NO
    )
    default_gpu_model: str = key(
        "", "remote hypervisor", annotation=SAME_NAME, vmms="R", support=NO
    )
    prefetch_list_path: str = key(
        "", "list of files to prefetch", annotation="prefetch_files.list", support=NO
    )
    boot_to_be_template: bool = key(False, "upstream's own use", support=INERT)
    boot_from_template: bool = key(False, "upstream's own use", support=INERT)
    memory_path: str = key("", "upstream's own use", support=INERT)
    device_state_path: str = key("", "upstream's own use", support=INERT)
