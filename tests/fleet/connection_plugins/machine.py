"""Ansible's connection to a host of `tests.fleet.hosts`: nsenter(1) into its process 1."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleConnectionFailure
from ansible.plugins.connection import ConnectionBase

DOCUMENTATION = """
name: machine
short_description: run in the namespaces of a process
description: Runs commands in the namespaces of a process, as root.
options:
  pid:
    description: The process.
    required: true
    vars:
      - name: machine_pid
"""


class Connection(ConnectionBase):  # type: ignore[misc]
    """The namespaces of the process machine_pid."""

    transport = "machine"
    has_pipelining = True

    def _connect(self) -> Connection:
        if not Path(self._inside("/etc")).is_dir():
            raise AnsibleConnectionFailure(f"there is no process {self.get_option('pid')}")
        return self

    def _inside(self, path: str) -> str:
        return f"/proc/{self.get_option('pid')}/root{path}"

    def exec_command(
        self, cmd: str, in_data: bytes | None = None, sudoable: bool = True
    ) -> tuple[int, bytes, bytes]:
        """Run a command; return its exit code and output."""
        super().exec_command(cmd, in_data=in_data, sudoable=sudoable)
        spaces = ("--mount", "--pid", "--cgroup", "--net", "--uts", "--root", "--wd")
        words = ["nsenter", f"--target={self.get_option('pid')}", *spaces, "--"]
        clean = ["env", "-i", "HOME=/root", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8"]
        done = subprocess.run(
            [*words, *clean, "/bin/sh", "-c", cmd], input=in_data, capture_output=True, check=False
        )
        return done.returncode, done.stdout, done.stderr

    def put_file(self, in_path: str, out_path: str) -> None:
        """Copy a file to the host."""
        super().put_file(in_path, out_path)
        shutil.copyfile(in_path, self._inside(out_path))

    def fetch_file(self, in_path: str, out_path: str) -> None:
        """Copy a file from the host."""
        super().fetch_file(in_path, out_path)
        shutil.copyfile(self._inside(in_path), out_path)

    def close(self, *_: Any) -> None:
        """Nothing stays open."""
