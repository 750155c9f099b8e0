# SPDX-License-Identifier: Apache-2.0
# Runs in the lab, once: installs the product the way the README tells, for the system's containerd.
set -eu
mkdir -p /var/log/lab /var/cache/pyc /var/cache/pykata /var/cache/above /var/cache/work
mount -t overlay -o lowerdir=/product/cache,upperdir=/var/cache/above,workdir=/var/cache/work \
  overlay /var/cache/pykata
cd /product/tree
make --no-print-directory install
# A maker of templates beside the container that is looked at would be what is measured.
mkdir /usr/local/share/defaults/kata-containers/config.d
# The agent's time to answer goes with PYKATA_SLOWNESS.
printf '[factory]\nenable_template = false\n[agent.kata]\ndial_timeout = 225\n' \
  > /usr/local/share/defaults/kata-containers/config.d/00-lab.toml
modprobe kvm_amd
modprobe -a vhost_vsock vhost_net
systemctl start containerd
python3 -c 'from integration.lib.images import busybox_image; print(busybox_image())' \
  | xargs ctr image import >/dev/null
