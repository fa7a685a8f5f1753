"""The completion scripts, and click's protocol with them, where its own falls short.

A script runs `ipsecgate` with _IPSECGATE_COMPLETE=SHELL_complete and prints nothing itself.

bash   breaks words at : = and @, and replaces only the last part. So it sends the line, not the
       words, and receives values without what precedes that part.
zsh    replaces the whole word, also if the word is --option=VALUE.
fish   as zsh; a description may contain commas.

Source: click.shell_completion; "Programmable Completion" in bash(1); zshcompsys(1);
complete(1) of fish.
"""

from __future__ import annotations

import os
import re
from typing import Any

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    FishComplete,
    ShellComplete,
    ZshComplete,
    add_completion_class,
    split_arg_string,
)

from ipsecgate.cli.app import COMPLETING

_BASH = r"""# bash completion of %(prog_name)s
%(complete_func)s() {
    local line type value
    COMPREPLY=()
    while IFS= read -r line; do
        type=${line%%%%,*} value=${line#*,}
        case $type in
            dir) compopt -o dirnames ;;
            file) compopt -o default ;;
            plain)
                COMPREPLY+=("$value")
                case $value in *[/:=]) compopt -o nospace ;; esac ;;
        esac
    done < <(COMP_LINE=${COMP_LINE:0:COMP_POINT} COMP_BREAKS=$COMP_WORDBREAKS \
        %(complete_var)s=bash_complete "$1" 2>/dev/null)
}
complete -o nosort -F %(complete_func)s %(prog_name)s
"""
_ZSH = r"""#compdef %(prog_name)s
# zsh completion of %(prog_name)s
%(complete_func)s() {
    local type value about
    local -a named plain response
    response=("${(@f)$(COMP_WORDS="${words[*]}" COMP_CWORD=$((CURRENT-1)) \
        %(complete_var)s=zsh_complete ${words[1]} 2>/dev/null)}")
    for type value about in $response; do
        case $type in
            dir) compset -P '-*='; _path_files -/ ;;
            file) compset -P '-*='; _path_files -f ;;
            plain) [[ $about == _ ]] && plain+=("$value") || named+=("$value:$about") ;;
        esac
    done
    (( $#named )) && _describe -V unsorted named -U
    (( $#plain )) && compadd -U -V unsorted -a plain
}
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
    %(complete_func)s "$@"
else
    compdef %(complete_func)s %(prog_name)s
fi
"""
_FISH = r"""# fish completion of %(prog_name)s
function %(complete_func)s
    set -l option (string match -r -- "^-[^=]*=" (commandline -ct))
    for line in (env %(complete_var)s=fish_complete COMP_WORDS=(commandline -cp | string collect) \
            COMP_CWORD=(commandline -ct | string collect) %(prog_name)s 2>/dev/null)
        set -l parts (string split -m 1 "," -- $line)
        switch $parts[1]
            case dir
                string replace -r "^" -- "$option" (__fish_complete_directories $parts[2])
            case file
                string replace -r "^" -- "$option" (__fish_complete_path $parts[2])
            case plain
                echo $parts[2]
        end
    end
end
complete --no-files --keep-order --command %(prog_name)s --arguments "(%(complete_func)s)"
"""


class _Whole(ShellComplete):
    """Completes a word --option=VALUE as a whole."""

    def get_completions(self, args: list[str], incomplete: str) -> list[CompletionItem[str]]:
        """Return the completions; see ShellComplete."""
        found = super().get_completions(args, incomplete)
        option, equals, _ = incomplete.partition("=")
        if not equals or not option.startswith("-"):
            return found
        return [
            CompletionItem(f"{option}={item.value}", item.type, item.help)
            if item.type == "plain"
            else item
            for item in found
        ]


class Bash(_Whole, BashComplete):
    """For bash 4.4 and newer."""

    source_template = _BASH
    kept = ""  # the parts of the word before the last break, which bash leaves alone

    def get_completion_args(self) -> tuple[list[str], str]:
        """Return the whole words, and the one that is being typed."""
        line = os.environ["COMP_LINE"]
        words = split_arg_string(line)
        typed = "" if line[-1:].isspace() or not words else words.pop()
        breaks = set(os.environ["COMP_BREAKS"]) - set(" \t\n\"'")
        self.kept = typed[: max((typed.rfind(each) for each in breaks), default=-1) + 1]
        return words[1:], typed

    def format_completion(self, item: CompletionItem[Any]) -> str:
        """Return TYPE,VALUE; the value is quoted and begins after the last break."""
        value = str(item.value)
        if item.type == "plain":
            value = re.sub(r"[^\w@%+=:,./-]", r"\\\g<0>", value.removeprefix(self.kept))
        return f"{item.type},{value}"


class Zsh(_Whole, ZshComplete):
    """For zsh 5."""

    source_template = _ZSH

    def format_completion(self, item: CompletionItem[Any]) -> str:
        """Return type, value and help, a line each. click 8.1.3 does not escape the colons."""
        value = str(item.value)
        if item.help:  # else compadd takes the value as it is
            value = value.replace(":", r"\:")
        return f"{item.type}\n{value}\n{item.help or '_'}"


class Fish(_Whole, FishComplete):
    """For fish 3 and newer."""

    source_template = _FISH

    def get_completion_args(self) -> tuple[list[str], str]:
        """Return the whole words, and the one that is being typed: click 8.1.3 leaves it quoted."""
        words = split_arg_string(os.environ["COMP_WORDS"])[1:]
        typed = "".join(split_arg_string(os.environ["COMP_CWORD"])[:1])
        if typed and words and words[-1] == typed:
            words.pop()
        return words, typed


SHELLS = {"bash": Bash, "zsh": Zsh, "fish": Fish}
for _shell in SHELLS.values():
    add_completion_class(_shell)  # not as a decorator: in click 8.1.3 it returns None


def script(shell: str, cli: click.Command) -> str:
    """Return the completion script of a shell."""
    complete = SHELLS[shell](cli, {}, "ipsecgate", COMPLETING)
    # Not ShellComplete.source(): for bash it would run bash to check its version.
    return complete.source_template % complete.source_vars()
