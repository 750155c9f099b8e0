# SPDX-License-Identifier: Apache-2.0
"""Saved VMs that others are cloned from."""

from vmm.template.store import Entry, Making, Template, TemplateBusyError, TemplateStore

__all__ = ["Entry", "Making", "Template", "TemplateBusyError", "TemplateStore"]
