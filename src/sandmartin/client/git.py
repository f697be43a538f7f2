"""Git repositories in a sandbox, by the `git` inside.

Credentials reach git through its environment and a credential helper that lives as long as the
command: they are in no argument, in no stored URL and in no file of the sandbox.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit, urlunsplit

from sandmartin.client.commands import AsyncCommands
from sandmartin.client.results import CommandResult
from sandmartin.errors import Invalid

DEFAULT_TIMEOUT_S = 300.0
_QUIET = {"GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
_HELPER = (
    '!f() { test "$1" = get && '
    'printf "username=%s\\npassword=%s\\n" "$SANDMARTIN_GIT_USER" "$SANDMARTIN_GIT_PASSWORD"; }; f'
)
_NO_BRANCH = "(detached)"


@dataclass(frozen=True)
class Credentials:
    """Who asks a remote over HTTPS."""

    username: str
    password: str

    def __repr__(self) -> str:
        return f"Credentials({self.username!r}, ...)"


@dataclass(frozen=True, kw_only=True)
class GitFile:
    """A file whose state differs from the last commit."""

    path: str
    #: As `git status` writes them: `M`, `A`, `D`, `R`, `C`, `U`, `?`, or `.` for unchanged.
    index: str
    worktree: str
    #: What it was called before a rename.
    renamed_from: str = ""


@dataclass(frozen=True, kw_only=True)
class GitStatus:
    """Where a repository is, and what has changed in it."""

    #: Empty when no branch is checked out.
    branch: str
    #: Empty when there is none.
    upstream: str
    ahead: int
    behind: int
    files: tuple[GitFile, ...]

    @property
    def is_clean(self) -> bool:
        """Whether nothing differs from what is committed."""
        return not self.files


@dataclass(frozen=True, kw_only=True)
class GitBranches:
    """The local branches of a repository."""

    #: Empty when none is checked out.
    current: str
    names: tuple[str, ...]


class AsyncGit:
    """Git repositories of a sandbox: `sandbox.git`.

    `path` is the repository's directory in the sandbox; `user` whose rights hold, root by default.
    All raise CommandFailed with what git says, and CommandTimedOut.
    """

    def __init__(self, commands: AsyncCommands) -> None:
        self._commands = commands

    async def clone(
        self,
        url: str,
        path: str,
        *,
        branch: str = "",
        depth: int | None = None,
        credentials: Credentials | None = None,
        user: str = "",
        timeout: float | None = DEFAULT_TIMEOUT_S,
    ) -> None:
        """Clone a repository to `path`, all of it or the newest `depth` commits.

        A name and password in the URL are taken for credentials, and are not stored.
        """
        url, found = split_credentials(url)
        words = ["clone", *(["--branch", branch] if branch else [])]
        words += ["--depth", str(depth)] if depth else []
        await self._run(
            [*words, "--", url, path],
            credentials=credentials or found,
            user=user,
            timeout=timeout,
        )

    async def init(self, path: str, *, branch: str = "main", user: str = "") -> None:
        """Make an empty repository at `path`, and the directories above it."""
        await self._run(["init", "--initial-branch", branch, "--", path], user=user)

    async def status(self, path: str, *, user: str = "") -> GitStatus:
        """The branch and what has changed."""
        words = ["status", "--porcelain=v2", "--branch", "-z"]
        return parse_status((await self._run(words, path, user=user)).stdout)

    async def add(self, path: str, files: Sequence[str] | None = None, *, user: str = "") -> None:
        """Stage files, named from `path` on; all that has changed by default."""
        await self._run(["add", "--all", *(["--", *files] if files else [])], path, user=user)

    async def commit(
        self,
        path: str,
        message: str,
        *,
        author: str = "",
        allow_empty: bool = False,
        user: str = "",
    ) -> str:
        """Commit what is staged, and give the commit's name in full.

        `author` is written `Name <address>`; without one `configure_user` says who it is.
        """
        words = ["commit", "--quiet", "--file", "-", "--cleanup", "verbatim"]
        words += ["--allow-empty"] if allow_empty else []
        words += [f"--author={author}"] if author else []
        await self._run(words, path, user=user, stdin=message)
        return (await self._run(["rev-parse", "HEAD"], path, user=user)).stdout.strip()

    async def push(
        self,
        path: str,
        *,
        remote: str = "origin",
        branch: str = "",
        set_upstream: bool = False,
        force: bool = False,
        credentials: Credentials | None = None,
        user: str = "",
        timeout: float | None = DEFAULT_TIMEOUT_S,
    ) -> None:
        """Push a branch, the current one by default. `force` refuses to drop unseen commits."""
        words = ["push", *(["--set-upstream"] if set_upstream else [])]
        words += ["--force-with-lease"] if force else []
        words += ["--", _word(remote), _word(branch or "HEAD")]
        await self._run(words, path, credentials=credentials, user=user, timeout=timeout)

    async def pull(
        self,
        path: str,
        *,
        remote: str = "origin",
        branch: str = "",
        rebase: bool = False,
        credentials: Credentials | None = None,
        user: str = "",
        timeout: float | None = DEFAULT_TIMEOUT_S,
    ) -> None:
        """Take over what a remote has, merged or by `rebase`."""
        words = ["pull", "--rebase" if rebase else "--no-rebase", "--", _word(remote)]
        words += [_word(branch)] if branch else []
        await self._run(words, path, credentials=credentials, user=user, timeout=timeout)

    async def branches(self, path: str, *, user: str = "") -> GitBranches:
        """The local branches, and which is checked out."""
        words = ["for-each-ref", "--format=%(HEAD)%(refname:short)", "refs/heads"]
        lines = (await self._run(words, path, user=user)).stdout.splitlines()
        current = next((each[1:] for each in lines if each.startswith("*")), "")
        return GitBranches(current=current, names=tuple(each[1:] for each in lines))

    async def checkout(
        self, path: str, branch: str, *, create: bool = False, user: str = ""
    ) -> None:
        """Check out a branch or a commit; `create` makes a branch from where it is."""
        words = ["checkout", "--quiet", *(["-b"] if create else []), _word(branch)]
        await self._run(words if create else [*words, "--"], path, user=user)

    async def delete_branch(
        self, path: str, branch: str, *, force: bool = False, user: str = ""
    ) -> None:
        """Delete a branch; one that is not merged only by `force`."""
        words = ["branch", "--delete", *(["--force"] if force else []), "--", branch]
        await self._run(words, path, user=user)

    async def get_config(self, name: str, *, path: str = "", user: str = "") -> str | None:
        """A setting of the repository at `path`, or of the user; None when it is not set."""
        words = ["config", *([] if path else ["--global"]), "--get", _word(name)]
        result = await self._run(words, path, user=user, check=False)
        return result.stdout.rstrip("\n") if result.exit_code == 0 else None

    async def set_config(self, name: str, value: str, *, path: str = "", user: str = "") -> None:
        """Change a setting of the repository at `path`, or of the user."""
        words = ["config", *([] if path else ["--global"]), _word(name), value]
        await self._run(words, path, user=user)

    async def configure_user(
        self, name: str, email: str, *, path: str = "", user: str = ""
    ) -> None:
        """Say who commits, in the repository at `path`, or everywhere."""
        await self.set_config("user.name", name, path=path, user=user)
        await self.set_config("user.email", email, path=path, user=user)

    async def _run(
        self,
        words: Sequence[str],
        path: str = "",
        *,
        credentials: Credentials | None = None,
        user: str = "",
        stdin: str | bool = False,
        timeout: float | None = DEFAULT_TIMEOUT_S,
        check: bool = True,
    ) -> CommandResult:
        return await self._commands.run(
            ["git", *(["-C", path] if path else []), *words],
            user=user,
            envs={**_QUIET, **_environment(credentials)},
            stdin=stdin,
            timeout=timeout,
            check=check,
        )


def split_credentials(url: str) -> tuple[str, Credentials | None]:
    """A URL without the name and password in it, and these."""
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise Invalid("the URL of the repository cannot be read") from error
    if parts.scheme not in {"http", "https"} or "@" not in parts.netloc:
        return url, None
    _, _, host = parts.netloc.rpartition("@")
    found = Credentials(unquote(parts.username or ""), unquote(parts.password or ""))
    return urlunsplit(parts._replace(netloc=host)), found


def _environment(credentials: Credentials | None) -> Mapping[str, str]:
    """What makes git take the credentials, and hand them to no helper that would store them."""
    if credentials is None:
        return {}
    if any("\n" in each or "\0" in each for each in (credentials.username, credentials.password)):
        raise Invalid("the credentials have a line end or a NUL in them")
    return {
        "GIT_CONFIG_COUNT": "2",
        "GIT_CONFIG_KEY_0": "credential.helper",
        "GIT_CONFIG_VALUE_0": "",
        "GIT_CONFIG_KEY_1": "credential.helper",
        "GIT_CONFIG_VALUE_1": _HELPER,
        "SANDMARTIN_GIT_USER": credentials.username,
        "SANDMARTIN_GIT_PASSWORD": credentials.password,
    }


def _word(name: str) -> str:
    """A name that git cannot take for an option. Raises Invalid."""
    if not name or name.startswith("-"):
        raise Invalid(f"{name[:80]!r} is no name of a remote, branch or setting")
    return name


def parse_status(said: str) -> GitStatus:
    """What `git status --porcelain=v2 --branch -z` says."""
    heads: dict[str, str] = {}
    files = []
    entries = iter(said.split("\0"))
    for entry in entries:
        kind, _, rest = entry.partition(" ")
        if kind == "#":
            name, _, value = rest.partition(" ")
            heads[name] = value
        elif kind in {"1", "u"}:
            states, *_, path = rest.split(" ", 7 if kind == "1" else 9)
            files.append(GitFile(path=path, index=states[0], worktree=states[1]))
        elif kind == "2":
            states, *_, path = rest.split(" ", 8)
            files.append(
                GitFile(
                    path=path,
                    index=states[0],
                    worktree=states[1],
                    renamed_from=next(entries, ""),
                )
            )
        elif kind == "?":
            files.append(GitFile(path=rest, index="?", worktree="?"))
    ahead, _, behind = heads.get("branch.ab", "+0 -0").partition(" ")
    branch = heads.get("branch.head", "")
    return GitStatus(
        branch="" if branch == _NO_BRANCH else branch,
        upstream=heads.get("branch.upstream", ""),
        ahead=abs(int(ahead)),
        behind=abs(int(behind)),
        files=tuple(files),
    )
