package process

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"connectrpc.com/connect"
	"github.com/creack/pty"
	"golang.org/x/sys/unix"

	processpb "sandmartin.dev/guest/internal/gen/process"
	"sandmartin.dev/guest/internal/users"
)

const basePath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// environment is that of a process: the base, the user's, the sandbox's, the request's.
func environment(user *users.User, terminal bool, layers ...map[string]string) map[string]string {
	envs := map[string]string{"PATH": basePath, "HOME": user.Home, "USER": user.Name, "LOGNAME": user.Name, "SHELL": user.Shell}
	if terminal {
		envs["TERM"] = "xterm-256color"
	}
	for _, layer := range layers {
		maps.Copy(envs, layer)
	}
	return envs
}

// lookUp finds the command as the user would. What cannot be started is told apart from what
// ran and failed.
func lookUp(user *users.User, command, directory, path string) (string, error) {
	var found string
	err := user.As(func() error {
		info, err := os.Stat(directory)
		if err != nil || !info.IsDir() {
			return connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("cwd '%s' is not a directory that user '%s' can enter", directory, user.Name))
		}
		found, err = search(user, command, directory, path)
		return err
	})
	return found, err
}

func search(user *users.User, command, directory, path string) (string, error) {
	if strings.Contains(command, "/") {
		if !filepath.IsAbs(command) {
			command = filepath.Join(directory, command)
		}
		return command, executable(user, command, command)
	}
	denied := error(nil)
	for _, entry := range filepath.SplitList(path) {
		if !filepath.IsAbs(entry) {
			entry = filepath.Join(directory, entry)
		}
		candidate := filepath.Join(entry, command)
		err := executable(user, command, candidate)
		if err == nil {
			return candidate, nil
		}
		if connect.CodeOf(err) == connect.CodePermissionDenied {
			denied = err
		}
	}
	if denied != nil {
		return "", denied
	}
	return "", connect.NewError(connect.CodeNotFound, fmt.Errorf("command '%s' was not found in PATH", command))
}

func executable(user *users.User, command, path string) error {
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, os.ErrPermission):
		return connect.NewError(connect.CodePermissionDenied, fmt.Errorf("command '%s' may not be reached by user '%s'", command, user.Name))
	case err != nil:
		return connect.NewError(connect.CodeNotFound, fmt.Errorf("command '%s' was not found", command))
	case info.IsDir():
		return connect.NewError(connect.CodePermissionDenied, fmt.Errorf("command '%s' is a directory", command))
	case !mayExecute(user, info):
		return connect.NewError(connect.CodePermissionDenied, fmt.Errorf("command '%s' is not executable by user '%s'", command, user.Name))
	}
	return nil
}

func mayExecute(user *users.User, info os.FileInfo) bool {
	stat, mode := info.Sys().(*syscall.Stat_t), info.Mode().Perm()
	switch {
	case user.UID == 0:
		return mode&0o111 != 0
	case stat.Uid == user.UID:
		return mode&0o100 != 0
	case slices.Contains(user.Groups, stat.Gid) || stat.Gid == user.GID:
		return mode&0o010 != 0
	}
	return mode&0o001 != 0
}

// begin starts the process and its pumps. limit 0 is no time limit.
func (s *Service) begin(user *users.User, request *processpb.StartRequest, limit time.Duration) (*Process, *subscriber, error) {
	config := request.GetProcess()
	terminal := request.GetPty() != nil
	defaultUser, workdir := s.identity.Defaults()
	if user.Name != defaultUser {
		workdir = ""
	}
	directory := user.Resolve(config.GetCwd(), workdir)
	envs := environment(user, terminal, s.identity.Envs(), config.GetEnvs())
	path, err := lookUp(user, config.GetCmd(), directory, envs["PATH"])
	if err != nil {
		return nil, nil, err
	}
	p := &Process{config: config, tag: request.Tag, subscribers: map[*subscriber]struct{}{}}
	p.cmd = &exec.Cmd{Path: path, Args: append([]string{config.GetCmd()}, config.GetArgs()...), Dir: directory}
	for _, name := range slices.Sorted(maps.Keys(envs)) {
		p.cmd.Env = append(p.cmd.Env, name+"="+envs[name])
	}
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if os.Geteuid() == 0 {
		p.cmd.SysProcAttr.Credential = user.Credential()
	}
	group, opened := newCgroup(s.sequence.Add(1))
	if opened != nil {
		defer opened.Close()
		p.cgroup = group
		p.cmd.SysProcAttr.UseCgroupFD, p.cmd.SysProcAttr.CgroupFD = true, int(opened.Fd())
	}
	outputs, pumps, err := p.launch(request)
	if err != nil {
		if p.cgroup != "" {
			_ = os.Remove(p.cgroup)
		}
		return nil, nil, startError(config.GetCmd(), err)
	}
	listener := p.subscribe()
	s.add(p)
	var timer *time.Timer
	if limit > 0 {
		timer = time.AfterFunc(limit, p.expire)
	}
	var running sync.WaitGroup
	for _, pump := range pumps {
		running.Go(pump)
	}
	go func() {
		p.wait(outputs, &running, timer)
		time.AfterFunc(keepEnded, func() { s.remove(p) })
	}()
	return p, listener, nil
}

func startError(command string, err error) error {
	code := connect.CodeInternal
	switch {
	case errors.Is(err, unix.ENOENT):
		// The file is there, so its interpreter is not.
		code = connect.CodeNotFound
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM), errors.Is(err, unix.ENOEXEC):
		code = connect.CodePermissionDenied
	case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.ENOMEM), errors.Is(err, unix.EMFILE):
		code = connect.CodeResourceExhausted
	case errors.Is(err, unix.E2BIG):
		code = connect.CodeInvalidArgument
	}
	return connect.NewError(code, fmt.Errorf("command '%s' could not be started: %w", command, err))
}

// launch wires the process up and starts it.
func (p *Process) launch(request *processpb.StartRequest) ([]*os.File, []func(), error) {
	if request.GetPty() != nil {
		return p.launchTerminal(request.GetPty())
	}
	var theirs []*os.File
	defer func() {
		for _, file := range theirs {
			_ = file.Close()
		}
	}()
	if request.Stdin == nil || request.GetStdin() {
		read, write, err := os.Pipe()
		if err != nil {
			return nil, nil, err
		}
		theirs = append(theirs, read)
		p.cmd.Stdin, p.stdin = read, write
	}
	stdout, outWrite, err := os.Pipe()
	if err != nil {
		p.closeStdin()
		return nil, nil, err
	}
	theirs = append(theirs, outWrite)
	stderr, errWrite, err := os.Pipe()
	if err != nil {
		p.closeStdin()
		return nil, nil, errors.Join(err, stdout.Close())
	}
	theirs = append(theirs, errWrite)
	p.cmd.Stdout, p.cmd.Stderr = outWrite, errWrite
	if err := p.cmd.Start(); err != nil {
		p.closeStdin()
		return nil, nil, errors.Join(err, stdout.Close(), stderr.Close())
	}
	p.pid = p.cmd.Process.Pid
	resetScore(p.pid)
	return []*os.File{stdout, stderr}, []func(){
		func() { p.pump(stdout, chunkSize, asStdout) },
		func() { p.pump(stderr, chunkSize, asStderr) },
	}, nil
}

func (p *Process) launchTerminal(request *processpb.PTY) ([]*os.File, []func(), error) {
	p.cmd.SysProcAttr.Setctty = true
	master, err := pty.StartWithAttrs(p.cmd, windowSize(request), p.cmd.SysProcAttr)
	if err != nil {
		return nil, nil, err
	}
	p.pid, p.pty = p.cmd.Process.Pid, master
	resetScore(p.pid)
	return []*os.File{master}, []func(){func() { p.pump(master, ptyChunkSize, asTerminal) }}, nil
}

func windowSize(request *processpb.PTY) *pty.Winsize {
	size := &pty.Winsize{Cols: 80, Rows: 24}
	if given := request.GetSize(); given != nil {
		size.Cols, size.Rows = uint16(given.GetCols()), uint16(given.GetRows())
	}
	return size
}

func asStdout(data []byte) *processpb.ProcessEvent_DataEvent {
	return &processpb.ProcessEvent_DataEvent{Output: &processpb.ProcessEvent_DataEvent_Stdout{Stdout: data}}
}

func asStderr(data []byte) *processpb.ProcessEvent_DataEvent {
	return &processpb.ProcessEvent_DataEvent{Output: &processpb.ProcessEvent_DataEvent_Stderr{Stderr: data}}
}

func asTerminal(data []byte) *processpb.ProcessEvent_DataEvent {
	return &processpb.ProcessEvent_DataEvent{Output: &processpb.ProcessEvent_DataEvent_Pty{Pty: data}}
}
