# SPDX-License-Identifier: Apache-2.0
"""Figures of a sandbox under Kata's names, in Prometheus' text format.

A shim imports `durations` from here; the rest is imported when somebody asks for figures.
"""
