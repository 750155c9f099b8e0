# SPDX-License-Identifier: Apache-2.0
"""Configuration files of the shape that Kata's two runtimes are shipped with."""

from __future__ import annotations

GO_QEMU = """
[hypervisor.qemu]
path = "/usr/bin/qemu-system-x86_64"
kernel = "/usr/share/kata-containers/vmlinux.container"
image = "/usr/share/kata-containers/kata-containers.img"
# initrd = "/usr/share/kata-containers/kata-containers-initrd.img"
machine_type = "q35"
rootfs_type = "ext4"
enable_annotations = ["enable_iommu", "kernel_params", "kernel_verity_params"]
valid_hypervisor_paths = ["/usr/bin/qemu-system-x86_64"]
kernel_params = ""
kernel_verity_params = ""
firmware = ""
firmware_volume = ""
machine_accelerators = ""
seccompsandbox = ""
cpu_features = "pmu=off"
default_vcpus = 1
default_maxvcpus = 0
default_bridges = 1
default_memory = 2048
memory_slots = 10
default_maxmemory = 0
memory_offset = 0
enable_virtio_mem = false
disable_block_device_use = true
shared_fs = "virtio-fs"
virtio_fs_daemon = "/usr/libexec/virtiofsd"
valid_virtio_fs_daemon_paths = ["/usr/libexec/virtiofsd"]
virtio_fs_cache_size = 0
virtio_fs_queue_size = 1024
virtio_fs_extra_args = ["--thread-pool-size=1", "--announce-submounts"]
virtio_fs_cache = "auto"
block_device_driver = "virtio-scsi"
block_device_aio = "io_uring"
block_device_cache_set = false
block_device_cache_direct = false
block_device_cache_noflush = false
enable_iothreads = false
indep_iothreads = 0
enable_mem_prealloc = false
reclaim_guest_freed_memory = false
enable_hugepages = false
enable_vhost_user_store = false
vhost_user_store_path = "/var/run/kata-containers/vhost-user"
valid_vhost_user_store_paths = ["/var/run/kata-containers/vhost-user"]
vhost_user_reconnect_timeout_sec = 0
enable_iommu = false
enable_iommu_platform = false
enable_debug = false
hypervisor_loglevel = 1
extra_monitor_socket = ""
disable_nesting_checks = true
pcie_root_port = 0
pcie_switch_port = 0
hot_plug_vfio = "no-port"
cold_plug_vfio = "no-port"
disable_vhost_net = false
entropy_source = "/dev/urandom"
valid_entropy_sources = ["/dev/urandom", "/dev/random", ""]
guest_hook_path = ""
rx_rate_limiter_max_rate = 0
tx_rate_limiter_max_rate = 0
guest_memory_dump_path = ""
guest_memory_dump_paging = false
enable_guest_swap = false
use_legacy_serial = false
disable_guest_selinux = true
disable_selinux = false
rootless = false
confidential_guest = false
sev_snp_guest = false
snp_guest_policy = 196608
tdx_quote_generation_service_socket_port = 4050
measurement_algo = "sha512"
enable_numa = false
numa_mapping = []
pflashes = []

[factory]
enable_template = false
template_path = "/run/vc/vm/template"
vm_cache_number = 0
vm_cache_endpoint = "/var/run/kata-containers/cache.sock"

[agent.kata]
enable_debug = false
enable_tracing = false
kernel_modules = []
debug_console_enabled = false
dial_timeout = 45
cdh_api_timeout = 50
launch_process_timeout = 6
visible_cdi_devices = false

[runtime]
enable_debug = false
internetworking_model = "tcfilter"
disable_guest_seccomp = true
enable_vcpus_pinning = false
guest_selinux_label = ""
enable_tracing = false
jaeger_endpoint = ""
jaeger_user = ""
jaeger_password = ""
disable_new_netns = false
sandbox_cgroup_only = false
static_sandbox_resource_mgmt = false
sandbox_bind_mounts = []
vfio_mode = "guest-kernel"
disable_guest_empty_dir = true
emptydir_mode = "shared-fs"
experimental = []
experimental_force_guest_pull = false
enable_pprof = false
create_container_timeout = 60
dan_conf = "/run/kata-containers/dans"
kubelet_root_dir = "/var/lib/kubelet"
pod_resource_api_sock = ""
"""

RUST_QEMU = """
[hypervisor.qemu]
path = "/usr/bin/qemu-system-x86_64"
kernel = "/usr/share/kata-containers/vmlinux.container"
image = "/usr/share/kata-containers/kata-containers.img"
rootfs_type = "ext4"
vm_rootfs_driver = "virtio-pmem"
enable_annotations = ["enable_iommu", "kernel_params", "default_vcpus", "default_memory"]
valid_hypervisor_paths = ["/usr/bin/qemu-system-x86_64"]
valid_ctlpaths = []
block_device_driver = "virtio-blk-pci"
queue_size = 128
num_queues = 1
network_queues = 1
default_vcpus = 1.0
default_maxvcpus = 0
overhead_vcpus = 0.2
overhead_memory = 32
hugepage_type = "hugetlbfs"
seccomp_sandbox = ""
dbg_monitor_socket = ""
log_level = "info"
shared_fs = "virtio-fs"
virtio_fs_daemon = "/usr/libexec/virtiofsd"
virtio_fs_is_dax = false
guest_swap_path = "/run/kata-containers/swap"
guest_swap_size_percent = 100
guest_swap_create_threshold_secs = 60
disable_nested_virtualization = false
boot_to_be_template = false
boot_from_template = false
memory_path = ""
device_state_path = ""
initdata = ""
selinux_label = ""
prefetch_list_path = ""
disk_rate_limiter_bw_max_rate = 0
disk_rate_limiter_bw_one_time_burst = 0
disk_rate_limiter_ops_max_rate = 0
disk_rate_limiter_ops_one_time_burst = 0

[hypervisor.qemu.factory]
enable_template = false
template_path = "/run/vc/vm/template"

[agent.kata]
log_level = "info"
enable_tracing = false
debug_console_enabled = false
dial_timeout_ms = 10
reconnect_timeout_ms = 3000
create_container_timeout = 30
container_pipe_size = 0
kernel_modules = []
server_port = 1024
log_port = 1025
passfd_listener_port = 1027
health_check_request_timeout_ms = 90000
cdh_api_timeout_ms = 50000
policy = ""

[agent.kata.mem_agent]
mem_agent_enable = false
memcg_disable = false
memcg_swap = false
memcg_swappiness_max = 50
memcg_period_secs = 600
memcg_period_psi_percent_limit = 1
memcg_eviction_psi_percent_limit = 1
memcg_eviction_run_aging_count_min = 3
compact_disable = false
compact_period_secs = 600
compact_period_psi_percent_limit = 1
compact_psi_percent_limit = 5
compact_sec_max = 300
compact_order = 9
compact_threshold = 1024
compact_force_times = 9223372036854775807

[runtime]
name = "virt_container"
hypervisor_name = "qemu"
agent_name = "kata"
log_level = "info"
internetworking_model = "tcfilter"
disable_guest_seccomp = true
sandbox_cgroup_only = true
static_sandbox_resource_mgmt = true
keep_abnormal = false
use_passfd_io = false
passfd_listener_port = 1027
shared_mounts = []
experimental = []
"""
