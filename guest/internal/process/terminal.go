package process

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	processpb "sandmartin.dev/guest/internal/gen/process"
	"sandmartin.dev/guest/internal/users"
)

const (
	defaultColumns = 80
	defaultRows    = 24
)

// openTerminal makes a pseudo terminal whose inner end belongs to the user, as a login's does.
//
// The outer end stays non-blocking, which File.Fd would end: reads and writes need deadlines.
func openTerminal(size *processpb.PTY_Size, user *users.User) (outer, inner *os.File, err error) {
	outer, err = os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, nil, err
	}
	err = onTerminal(outer, func(fd int) error {
		if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
			return err
		}
		number, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
		if err != nil {
			return err
		}
		inner, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|unix.O_NOCTTY, 0)
		return err
	})
	if err == nil {
		err = resize(outer, size)
	}
	if err == nil && os.Geteuid() == 0 {
		err = inner.Chown(int(user.UID), -1)
	}
	if err != nil {
		_ = outer.Close()
		_ = inner.Close()
		return nil, nil, err
	}
	return outer, inner, nil
}

// resize sets the size of a terminal; what is not given or too large to be one is the usual size.
func resize(terminal *os.File, given *processpb.PTY_Size) error {
	size := &unix.Winsize{Col: defaultColumns, Row: defaultRows}
	if cols := given.GetCols(); cols > 0 && cols <= 0xffff {
		size.Col = uint16(cols)
	}
	if rows := given.GetRows(); rows > 0 && rows <= 0xffff {
		size.Row = uint16(rows)
	}
	return onTerminal(terminal, func(fd int) error { return unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, size) })
}

func onTerminal(terminal *os.File, do func(fd int) error) error {
	raw, err := terminal.SyscallConn()
	if err != nil {
		return err
	}
	var failed error
	if err := raw.Control(func(fd uintptr) { failed = do(int(fd)) }); err != nil {
		return err
	}
	return failed
}
