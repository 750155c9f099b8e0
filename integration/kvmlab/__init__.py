# SPDX-License-Identifier: Apache-2.0
"""The KVM lab: an emulated machine with nested virtualisation, for hosts that have none."""
