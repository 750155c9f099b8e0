# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from agent import cmdline

KATA_QEMU = (
    "tsc=reliable no_timer_check rcupdate.rcu_expedited=1 reboot=k cryptomgr.notests net.ifnames=0 "
    "pci=lastbus=0 console=hvc0 quiet systemd.show_status=false panic=1 nr_cpus=2 selinux=0 "
    'dm-mod.create="dm-verity,,,ro,0 agent.log=error 1" systemd.unit=kata-containers.target '
    "scsi_mod.scan=none agent.log=debug agent.debug_console agent.debug_console_vport=1026 "
    "agent.passfd_listener_port=1027 cgroup_no_v1=all\n"
)


def test_a_real_command_line() -> None:
    config = cmdline.parse(KATA_QEMU)
    assert config.log == "debug"
    assert config.debug
    assert config.debug_console
    assert config.debug_console_vport == 1026
    assert config.passfd_listener_port == 1027
    assert config.unified_cgroup_hierarchy is True
    assert config.server_addr == "vsock://-1:1024"
    assert config.warnings == []


def test_defaults() -> None:
    config = cmdline.parse("")
    assert (config.log, config.hotplug_timeout, config.launch_process_timeout) == ("info", 3, 6)
    assert (config.cdh_api_timeout, config.image_pull_timeout) == (50, 1200)
    assert config.secure_storage_integrity
    assert not config.debug_console
    assert config.unified_cgroup_hierarchy is None


def test_bad_values_warn_and_keep_the_default() -> None:
    config = cmdline.parse(
        "agent.hotplug_timeout=0 agent.log=loud agent.container_pipe_size=-1 "
        "agent.passfd_listener_port=many agent.server_addr=1024 agent.nonsense=1 "
        "agent.guest_components_procs=none,all agent.cdi_timeout="
    )
    defaults = cmdline.parse("")
    for name in cmdline.AgentConfig.__slots__:
        if name != "warnings":
            assert getattr(config, name) == getattr(defaults, name), name
    assert len(config.warnings) == 8
    assert "agent.hotplug_timeout='0'" in config.warnings[0]
    assert "agent.nonsense" in config.warnings[5]


def test_log_aliases() -> None:
    for text, level in (("warn", "warning"), ("panic", "critical"), ("fatal", "critical")):
        assert cmdline.parse(f"agent.log={text}").log == level


def test_boolean_texts() -> None:
    for text, value in (("true", True), ("1", True), ("0", False), ("yes", False), ("", False)):
        config = cmdline.parse(f"agent.trace={text} systemd.unified_cgroup_hierarchy={text}")
        assert config.trace is value
        assert config.unified_cgroup_hierarchy is value
    assert not cmdline.parse("agent.secure_storage_integrity=false").secure_storage_integrity


def test_addresses() -> None:
    for text in ("vsock://-1:1024", "unix:///run/agent.sock", "serial://agent.channel.0"):
        config = cmdline.parse(f"agent.server_addr={text}")
        assert config.server_addr == text
        assert not config.warnings


def test_file_replaces_the_command_line(tmp_path) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "agent.toml"
    file.write_text(
        'log_level = "warn"\ndebug_console = true\nhotplug_timeout = {secs = 8, nanos = 0}\n'
        'launch_process_timeout = 9\nguest_components_procs = "none"\nodd = 1\n'
        'policy_file = "/p.rego"\n[mem_agent]\nenable = true\n'
    )
    line = tmp_path / "cmdline"
    line.write_text(f"agent.config_file={file} agent.cdi_timeout=7 agent.log=debug")
    config = cmdline.load(str(line), {"KATA_AGENT_LOG_LEVEL": "trace"})
    assert config.log == "trace"
    assert config.debug_console
    assert (config.hotplug_timeout, config.launch_process_timeout) == (8, 9)
    assert config.cdi_timeout == 100
    assert config.policy_file == "/p.rego"
    assert config.mem_agent == {"enable": "True"}
    assert config.warnings == [f"{file}: key 'odd' is unknown to this agent"]


def test_broken_file_falls_back(tmp_path) -> None:  # type: ignore[no-untyped-def]
    line = tmp_path / "cmdline"
    line.write_text(f"agent.config_file={tmp_path}/none.toml agent.cdi_timeout=7")
    config = cmdline.load(str(line), {})
    assert config.cdi_timeout == 7
    assert "none.toml" in config.warnings[0]


def test_no_command_line_at_all(tmp_path) -> None:  # type: ignore[no-untyped-def]
    config = cmdline.load(str(tmp_path / "cmdline"), {})
    assert config.log == "info"
    assert config.warnings
