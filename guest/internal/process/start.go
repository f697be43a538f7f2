package process

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	processpb "sandmartin.dev/guest/internal/gen/process"
	"sandmartin.dev/guest/internal/users"
)

const basePath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// validate refuses what the kernel could not take or would take for something else.
func validate(config *processpb.ProcessConfig) error {
	if config.GetCmd() == "" {
		return errors.New("no command is given")
	}
	texts := append([]string{config.GetCmd(), config.GetCwd()}, config.GetArgs()...)
	for name, value := range config.GetEnvs() {
		if name == "" || strings.Contains(name, "=") {
			return fmt.Errorf("'%s' cannot be the name of an environment variable", name)
		}
		texts = append(texts, name, value)
	}
	for _, text := range texts {
		if strings.ContainsRune(text, 0) {
			return errors.New("the command, its arguments or its environment contain a NUL character")
		}
	}
	return nil
}

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

// lookUp finds the directory and the command as the user would. What cannot be started is told
// apart from what ran and failed.
func lookUp(user *users.User, command, asked, workdir, path string) (directory, found string, err error) {
	directory = user.Resolve(asked, workdir)
	err = user.As(func() (err error) {
		if !mayEnter(directory) {
			if asked != "" {
				return connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("cwd '%s' is not a directory that user '%s' can enter", directory, user.Name))
			}
			// As a login does: not every account has its home in every image.
			directory = "/"
		}
		found, err = search(user, command, directory, path)
		return err
	})
	return directory, found, err
}

func mayEnter(directory string) bool {
	info, err := os.Stat(directory)
	return err == nil && info.IsDir() && mayExecute(directory)
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
	case !mayExecute(path):
		return connect.NewError(connect.CodePermissionDenied, fmt.Errorf("command '%s' is not executable by user '%s'", command, user.Name))
	}
	return nil
}

// mayExecute asks the kernel for this thread's file system rights, so ACLs and noexec count.
func mayExecute(path string) bool {
	return unix.Faccessat(unix.AT_FDCWD, path, unix.X_OK, unix.AT_EACCESS) == nil
}

// begin starts the process and its pumps. limit 0 is no time limit.
func (s *Service) begin(user *users.User, request *processpb.StartRequest, limit time.Duration) (*Process, *subscriber, error) {
	config := request.GetProcess()
	program, err := s.prepare(user, request)
	if err != nil {
		return nil, nil, err
	}
	p := &Process{feed: newFeed(), config: config, tag: request.Tag, program: program, turn: make(chan struct{}, 1)}
	outputs, pumps, err := s.launch(p, request, user)
	if err != nil {
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
		// Those who wait for its end come first.
		time.AfterFunc(tidyPause, func() {
			s.groups.release(p.cgroup)
			s.groups.prepare()
		})
		time.AfterFunc(keepEnded, func() { s.remove(p) })
	}()
	return p, listener, nil
}

// launch starts a process in a control group of its own.
func (s *Service) launch(p *Process, request *processpb.StartRequest, user *users.User) ([]*os.File, []func(), error) {
	group := s.groups.take()
	outputs, pumps, err := p.launch(request, user, group)
	if err != nil && group.removed() {
		// It was made ahead, and somebody has not left it alone.
		group.close()
		group = s.groups.create()
		outputs, pumps, err = p.launch(request, user, group)
	}
	group.close()
	if err != nil {
		s.groups.release(group.path)
	}
	return outputs, pumps, err
}

// program is what the kernel is told of a process.
type program struct {
	path, directory string
	args, env       []string
	files           [3]uintptr
	sys             syscall.SysProcAttr
}

// prepare describes the process to the kernel: program, directory, environment, rights.
func (s *Service) prepare(user *users.User, request *processpb.StartRequest) (*program, error) {
	config := request.GetProcess()
	workdir := s.identity.WorkdirOf(user.Name)
	envs := environment(user, request.GetPty() != nil, s.identity.Envs(), config.GetEnvs())
	directory, path, err := lookUp(user, config.GetCmd(), config.GetCwd(), workdir, envs["PATH"])
	if err != nil {
		return nil, err
	}
	described := &program{path: path, directory: directory, args: append([]string{config.GetCmd()}, config.GetArgs()...)}
	for _, name := range slices.Sorted(maps.Keys(envs)) {
		described.env = append(described.env, name+"="+envs[name])
	}
	described.sys.Setsid = true
	if os.Geteuid() == 0 {
		described.sys.Credential = user.Credential()
	}
	return described, nil
}

func startError(command string, err error) error {
	code := connect.CodeInternal
	switch {
	case errors.Is(err, unix.ENOENT):
		// The file is there, so its interpreter is not.
		code = connect.CodeNotFound
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM), errors.Is(err, unix.ENOEXEC), errors.Is(err, unix.ETXTBSY):
		code = connect.CodePermissionDenied
	case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.ENOMEM), errors.Is(err, unix.EMFILE):
		code = connect.CodeResourceExhausted
	case errors.Is(err, unix.E2BIG):
		code = connect.CodeInvalidArgument
	}
	return connect.NewError(code, fmt.Errorf("command '%s' could not be started: %w", command, err))
}

// wiring is what a process is connected by: our ends, its ends, and who copies its output.
type wiring struct {
	theirs  []io.Closer
	outputs []*os.File
	pumps   []func()
}

// launch wires the process up and starts it.
func (p *Process) launch(request *processpb.StartRequest, user *users.User, group group) ([]*os.File, []func(), error) {
	var w wiring
	var err error
	if request.GetPty() != nil {
		err = p.wireTerminal(&w, request.GetPty(), user)
	} else {
		err = p.wirePipes(&w, request.Stdin == nil || request.GetStdin())
	}
	if err == nil {
		err = p.start(group)
	}
	if err != nil {
		for _, output := range w.outputs {
			_ = output.Close()
		}
		if p.input != nil && p.input != p.pty {
			_ = p.input.Close()
		}
		p.input, p.pty = nil, nil
	}
	for _, end := range w.theirs {
		_ = end.Close()
	}
	return w.outputs, w.pumps, err
}

func (p *Process) wireTerminal(w *wiring, request *processpb.PTY, user *users.User) error {
	outer, inner, err := openTerminal(request.GetSize(), user)
	if err != nil {
		return err
	}
	w.theirs, w.outputs = append(w.theirs, inner), []*os.File{outer}
	w.pumps = append(w.pumps, func() { p.pump(outer, ptyChunkSize, asTerminal) })
	p.pty, p.input = outer, outer
	p.program.files = [3]uintptr{inner.Fd(), inner.Fd(), inner.Fd()}
	p.program.sys.Setctty = true
	return nil
}

func (p *Process) wirePipes(w *wiring, withInput bool) error {
	if withInput {
		read, write, err := pipe()
		if err != nil {
			return err
		}
		w.theirs = append(w.theirs, end(read))
		p.program.files[0], p.input = uintptr(read), ours(write)
	} else {
		null, err := nullDevice()
		if err != nil {
			return err
		}
		p.program.files[0] = null.Fd()
	}
	for n, wrap := range []func([]byte) *processpb.ProcessEvent_DataEvent{asStdout, asStderr} {
		read, write, err := pipe()
		if err != nil {
			return err
		}
		from := ours(read)
		w.theirs, w.outputs = append(w.theirs, end(write)), append(w.outputs, from)
		w.pumps = append(w.pumps, func() { p.pump(from, chunkSize, wrap) })
		p.program.files[n+1] = uintptr(write)
	}
	return nil
}

// end is the other end of a pipe: blocking, as programs expect it, and not known to the runtime.
type end int

func (e end) Close() error { return unix.Close(int(e)) }

func pipe() (read, write int, err error) {
	var ends [2]int
	err = unix.Pipe2(ends[:], unix.O_CLOEXEC)
	return ends[0], ends[1], err
}

// ours makes one end of a pipe a file that is waited for without a thread.
func ours(fd int) *os.File {
	_ = unix.SetNonblock(fd, true)
	return os.NewFile(uintptr(fd), "pipe")
}

// nullDevice is the input of a process that gets none.
var nullDevice = sync.OnceValues(func() (*os.File, error) { return os.Open(os.DevNull) })

func (p *Process) start(group group) error {
	given := p.program
	p.cgroup = group.path
	if given.sys.UseCgroupFD = group.opened != nil; given.sys.UseCgroupFD {
		given.sys.CgroupFD = int(group.opened.Fd())
	}
	pid, err := syscall.ForkExec(given.path, given.args, &syscall.ProcAttr{Dir: given.directory, Env: given.env, Files: given.files[:], Sys: &given.sys})
	if err != nil {
		return err
	}
	p.pid = pid
	resetScore(pid)
	return nil
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
