package process

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"sandmartin.dev/guest/internal/content"
	processpb "sandmartin.dev/guest/internal/gen/process"
)

const (
	chunkSize    = 32 << 10
	ptyChunkSize = 16 << 10
	// Most processes write little.
	firstChunkSize = 4 << 10
	// The most a pipe or terminal can hold of what an ended process wrote (fs.pipe-max-size).
	pipeLimit = 1 << 20
	// How long an ended process can still be asked for its end.
	keepEnded = 30 * time.Second
	// How long what is left of an ended process waits to be cleared away.
	tidyPause = 100 * time.Millisecond
)

var errStdinClosed = errors.New("standard input is not open")

// Process is one started process. A slow subscriber slows it down through its pipe.
type Process struct {
	*feed
	config *processpb.ProcessConfig
	tag    *string

	program *program
	// Where input goes: a pipe or the terminal; nil when there is none.
	input  *os.File
	pty    *os.File
	cgroup string
	// Held while input is written, so that chunks keep their order.
	turn chan struct{}

	stateMu  sync.Mutex
	reaped   bool
	timedOut bool
}

// pump copies one output of the process until its end, or until what the process had written when
// it ended is through: a grandchild that keeps the output open does not keep the stream open.
func (p *Process) pump(from *os.File, size int, wrap func([]byte) *processpb.ProcessEvent_DataEvent) {
	buffer := make([]byte, firstChunkSize)
	for left := pipeLimit; left > 0; {
		n, err := from.Read(buffer)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			n, err = readNow(from, buffer)
			left -= n
		}
		if n > 0 {
			p.publish(&processpb.ProcessEvent{Event: &processpb.ProcessEvent_Data{Data: wrap(bytes.Clone(buffer[:n]))}})
		}
		if err != nil {
			break
		}
		if n == len(buffer) && n < size {
			buffer = make([]byte, size)
		}
	}
	go discard(from)
}

// discard reads on for as long as anybody holds the other end: a program that was left in the
// background must not die of what it prints.
func discard(from *os.File) {
	defer from.Close()
	if from.SetReadDeadline(time.Time{}) == nil {
		_, _ = io.Copy(io.Discard, from)
	}
}

// readNow reads what is there without waiting, deadline or not; nothing is io.EOF.
func readNow(from *os.File, buffer []byte) (int, error) {
	raw, err := from.SyscallConn()
	if err != nil {
		return 0, err
	}
	var n int
	var readErr error
	// Control and not Read, which would refuse at once because the deadline has passed.
	if err := raw.Control(func(fd uintptr) { n, readErr = unix.Read(int(fd), buffer) }); err != nil {
		return 0, err
	}
	if readErr != nil || n <= 0 {
		return 0, io.EOF
	}
	return n, nil
}

// wait sees the process to its end and publishes it.
func (p *Process) wait(outputs []*os.File, pumps *sync.WaitGroup, limit *time.Timer) {
	// The zombie is left until nobody can signal its number any more.
	var info unix.Siginfo
	for unix.Waitid(unix.P_PID, p.pid, &info, unix.WEXITED|unix.WNOWAIT, nil) == unix.EINTR {
	}
	p.stateMu.Lock()
	p.reaped = true
	timedOut := p.timedOut
	p.stateMu.Unlock()
	var status unix.WaitStatus
	for {
		if _, err := unix.Wait4(p.pid, &status, 0, nil); err != unix.EINTR {
			break
		}
	}
	if limit != nil {
		limit.Stop()
	}
	for _, output := range outputs {
		_ = output.SetReadDeadline(time.Now())
	}
	// Whoever writes to it now waits for a grandchild, if for anybody; this ends the wait.
	if p.input != nil && p.input != p.pty {
		_ = p.input.Close()
	}
	pumps.Wait()
	p.finish(endEvent(status, timedOut))
}

func endEvent(status unix.WaitStatus, timedOut bool) *processpb.ProcessEvent {
	end := &processpb.ProcessEvent_EndEvent{
		ExitCode: int32(status.ExitStatus()),
		Exited:   status.Exited(),
		Status:   "exit status " + strconv.Itoa(status.ExitStatus()),
		TimedOut: timedOut && status.Signaled(),
	}
	if status.Signaled() {
		end.Status = "signal: " + status.Signal().String()
		if status.CoreDump() {
			end.Status += " (core dumped)"
		}
		end.Signal = int32(status.Signal())
		end.Error = &end.Status
	}
	if end.TimedOut {
		text := "deadline exceeded: the time limit of the process had passed"
		end.Error = &text
	}
	return &processpb.ProcessEvent{Event: &processpb.ProcessEvent_End{End: end}}
}

// running tells whether the process has not ended yet.
func (p *Process) running() bool {
	p.stateMu.Lock()
	defer p.stateMu.Unlock()
	return !p.reaped
}

// expire ends the process and all it started, because its time is over.
func (p *Process) expire() {
	p.stateMu.Lock()
	p.timedOut = !p.reaped
	p.stateMu.Unlock()
	_ = p.signal(unix.SIGKILL)
}

// signal reaches the process alone; SIGKILL reaches all it started.
func (p *Process) signal(number unix.Signal) error {
	p.stateMu.Lock()
	defer p.stateMu.Unlock()
	if p.reaped {
		return os.ErrProcessDone
	}
	if number != unix.SIGKILL {
		return unix.Kill(p.pid, number)
	}
	if p.cgroup != "" {
		_ = os.WriteFile(filepath.Join(p.cgroup, "cgroup.kill"), []byte("1"), 0)
	}
	return unix.Kill(-p.pid, number)
}

// write sends bytes to stdin or the terminal, after what was written before.
func (p *Process) write(ctx context.Context, data []byte) error {
	if p.input == nil {
		return errStdinClosed
	}
	select {
	case p.turn <- struct{}{}:
		defer func() { <-p.turn }()
	case <-ctx.Done():
		return ctx.Err()
	}
	_ = p.input.SetWriteDeadline(time.Time{})
	interrupted := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		_ = p.input.SetWriteDeadline(time.Now())
		close(interrupted)
	})
	_, err := p.input.Write(data)
	if !stop() {
		// Or it would cut off the next writer.
		<-interrupted
	}
	return err
}

// closeInput lets the process read the end of its input after all that was written before.
func (p *Process) closeInput(ctx context.Context) error {
	if p.input == nil {
		return nil
	}
	select {
	case p.turn <- struct{}{}:
		defer func() { <-p.turn }()
	case <-ctx.Done():
		return ctx.Err()
	}
	_ = p.input.Close()
	return nil
}

// resetScore makes a process an ordinary candidate when memory runs out; the agent is none.
func resetScore(pid int) {
	_ = content.Write("/proc/"+strconv.Itoa(pid)+"/oom_score_adj", "0")
}
