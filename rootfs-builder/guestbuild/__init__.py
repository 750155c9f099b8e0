# SPDX-License-Identifier: Apache-2.0
"""Builds the guest: a kernel and a root image, from Debian packages and a YAML description."""
