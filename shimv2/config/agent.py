# SPDX-License-Identifier: Apache-2.0
"""``[agent.kata]``: the agent in the guest."""

from __future__ import annotations

from .keys import SAME_NAME, U32, U63, Section, Support, key

NO, INERT, REFUSED = Support.NO, Support.INERT, Support.REFUSED
U16 = (1 << 16) - 1


class AgentConfig(Section):
    """How the agent is started and talked to."""

    enable_debug: bool = key(False, "the agent's debug messages", sample=True)
    log_level: str = key(
        "info",
        "how much the agent says",
        choices=("trace", "debug", "info", "warn", "error", "critical"),
        synonyms={"warning": "warn", "fatal": "critical", "panic": "critical"},
    )
    enable_tracing: bool = key(
        False, "OpenTelemetry in the agent", annotation=SAME_NAME, support=NO
    )
    kernel_modules: tuple[str, ...] = key(
        (),
        "modules to load in the guest, each with its parameters",
        annotation=SAME_NAME,
        separator=";",
        sample=True,
    )
    debug_console_enabled: bool = key(
        False, "a root shell in the guest for `kata-runtime exec`", sample=True
    )
    dial_timeout: int = key(
        0,
        "how long to wait for the agent; 0 means 45",
        unit="s",
        low=0,
        high=3600,
        sample=True,
    )
    dial_timeout_ms: int = key(
        10, "pause between attempts", unit="ms", low=0, high=U32, support=INERT
    )
    reconnect_timeout_ms: int = key(
        3000,
        "how long to try; `dial_timeout` counts here",
        unit="ms",
        low=0,
        high=U32,
        support=INERT,
    )
    launch_process_timeout: int = key(
        0,
        "limit of the guest's helpers; 0 means the agent's own",
        unit="s",
        low=0,
        high=U32,
        support=INERT,
    )
    create_container_timeout: int = key(
        0,
        "limit of CreateContainer; 0 means that of [runtime]",
        unit="s",
        low=0,
        high=U32,
    )
    container_pipe_size: int = key(
        0,
        "size of a container's stdio pipes; 0 means the kernel's",
        unit="bytes",
        low=0,
        high=1 << 30,
        annotation=SAME_NAME,
    )
    health_check_request_timeout_ms: int = key(
        90000, "limit of a health check (10 s here)", unit="ms", low=0, high=U32, support=INERT
    )
    server_port: int = key(1024, "vsock port of the agent", low=1, high=U32, support=NO)
    log_port: int = key(1025, "vsock port of the agent's log", low=1, high=U32, support=INERT)
    passfd_listener_port: int = key(
        1027, "vsock port of the stdio streams", low=1, high=U32, support=NO
    )
    cdh_api_timeout: int = key(0, "confidential data hub", unit="s", low=0, high=U32, support=INERT)
    cdh_api_timeout_ms: int = key(
        50000,
        "confidential data hub",
        unit="ms",
        low=0,
        high=U32,
        annotation=SAME_NAME,
        support=INERT,
    )
    visible_cdi_devices: bool = key(False, "CDI devices by environment variable", support=NO)
    policy: str = key("", "rules for the agent's requests", annotation=SAME_NAME, support=REFUSED)


class MemAgentConfig(Section):
    """``[agent.kata.mem_agent]``: upstream's memory agent, which this guest doesn't have."""

    mem_agent_enable: bool = key(
        False, "reclaim the guest's memory", aliases=("enable",), support=NO
    )
    memcg_disable: bool = key(False, "memory agent", support=INERT)
    memcg_swap: bool = key(False, "memory agent", support=INERT)
    memcg_swappiness_max: int = key(50, "memory agent", low=0, high=200, support=INERT)
    memcg_period_secs: int = key(600, "memory agent", unit="s", low=0, high=U63, support=INERT)
    memcg_period_psi_percent_limit: int = key(
        1, "memory agent", unit="%", low=0, high=100, support=INERT
    )
    memcg_eviction_psi_percent_limit: int = key(
        1, "memory agent", unit="%", low=0, high=100, support=INERT
    )
    memcg_eviction_run_aging_count_min: int = key(3, "memory agent", low=0, high=U63, support=INERT)
    compact_disable: bool = key(False, "memory agent", support=INERT)
    compact_period_secs: int = key(600, "memory agent", unit="s", low=0, high=U63, support=INERT)
    compact_period_psi_percent_limit: int = key(
        1, "memory agent", unit="%", low=0, high=100, support=INERT
    )
    compact_psi_percent_limit: int = key(
        5, "memory agent", unit="%", low=0, high=100, support=INERT
    )
    compact_sec_max: int = key(300, "memory agent", unit="s", low=0, high=U63, support=INERT)
    compact_order: int = key(9, "memory agent", low=0, high=U16, support=INERT)
    compact_threshold: int = key(1024, "memory agent", low=0, high=U63, support=INERT)
    compact_force_times: int = key(U63, "memory agent", low=0, high=U63, support=INERT)
