# SPDX-License-Identifier: Apache-2.0
"""Saved VMs that others are cloned from."""

from vmm.template.store import Making, Template, TemplateBusyError, TemplateStore

__all__ = ["Making", "Template", "TemplateBusyError", "TemplateStore"]
