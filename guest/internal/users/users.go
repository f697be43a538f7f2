// Package users knows the accounts of the root file system and does work with their rights.
//
// The accounts are read from /etc/passwd and /etc/group directly: the binary is static and an
// image need not have a name service.
package users

import (
	"bufio"
	"cmp"
	"errors"
	"fmt"
	"math"
	"os"
	"path"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A group may have many members, all on one line.
const maxLine = 1 << 20

// ErrUnknown is what errors about an account that does not exist are.
var ErrUnknown = errors.New("unknown user")

// unknown is the error about one name, in the words that E2B's clients know.
type unknown string

func (u unknown) Error() string { return "invalid username: '" + string(u) + "'" }

func (u unknown) Is(target error) bool { return target == ErrUnknown }

// User is one account with all its groups.
type User struct {
	Name   string
	UID    uint32
	GID    uint32
	Groups []uint32
	Home   string
	Shell  string
	// Raised is set where whoever asks for this user may ask for root as well; see Within.
	Raised bool
}

// Find returns the account called name; a number is taken as a user id, known or not.
func Find(name string) (*User, error) {
	found, err := scanPasswd(func(fields []string) bool { return fields[0] == name || fields[2] == name })
	if err != nil {
		return nil, err
	}
	if found == nil {
		return numeric(name)
	}
	found.Groups = supplementary(found)
	return found, nil
}

func numeric(name string) (*User, error) {
	uid, err := strconv.ParseUint(name, 10, 32)
	// The largest number means "leave it" to the kernel: it would be our own id.
	if (err != nil && name != "root") || uid == math.MaxUint32 {
		return nil, unknown(name)
	}
	// An image without /etc/passwd still has its root.
	user := &User{Name: name, UID: uint32(uid), GID: uint32(uid), Home: "/", Shell: "/bin/sh"}
	user.Groups = []uint32{user.GID}
	return user, nil
}

// FindGroup returns the number of the group called name; a number is taken as it is.
func FindGroup(name string) (uint32, error) {
	if gid, err := strconv.ParseUint(name, 10, 32); err == nil && gid != math.MaxUint32 {
		return uint32(gid), nil
	}
	found, known := uint32(0), false
	err := scan("/etc/group", 4, func(fields []string) bool {
		gid, err := strconv.ParseUint(fields[2], 10, 32)
		if err == nil && fields[0] == name && gid != math.MaxUint32 {
			found, known = uint32(gid), true
		}
		return !known
	})
	if err == nil && !known {
		err = fmt.Errorf("unknown group: '%s'", name)
	}
	return found, err
}

func scanPasswd(match func([]string) bool) (*User, error) {
	var found *User
	err := scan("/etc/passwd", 7, func(fields []string) bool {
		uid, errUID := strconv.ParseUint(fields[2], 10, 32)
		gid, errGID := strconv.ParseUint(fields[3], 10, 32)
		if errUID != nil || errGID != nil || uid == math.MaxUint32 || gid == math.MaxUint32 || !match(fields) {
			return true
		}
		found = &User{Name: fields[0], UID: uint32(uid), GID: uint32(gid), Home: cmp.Or(fields[5], "/"), Shell: cmp.Or(fields[6], "/bin/sh")}
		return false
	})
	return found, err
}

func supplementary(user *User) []uint32 {
	groups := []uint32{user.GID}
	_ = scan("/etc/group", 4, func(fields []string) bool {
		gid, err := strconv.ParseUint(fields[2], 10, 32)
		if err == nil && slices.Contains(strings.Split(fields[3], ","), user.Name) && uint32(gid) != user.GID {
			groups = append(groups, uint32(gid))
		}
		return true
	})
	return groups
}

// Names looks up the names of user and group ids, each once.
type Names struct{ users, groups map[uint32]string }

// NewNames returns a Names that knows none yet.
func NewNames() *Names { return &Names{map[uint32]string{}, map[uint32]string{}} }

// User returns the name of a user id, or the number.
func (n *Names) User(uid uint32) string { return nameIn("/etc/passwd", 7, uid, n.users) }

// Group returns the name of a group id, or the number.
func (n *Names) Group(gid uint32) string { return nameIn("/etc/group", 4, gid, n.groups) }

func nameIn(file string, fields int, id uint32, known map[uint32]string) string {
	if name, ok := known[id]; ok {
		return name
	}
	number := strconv.FormatUint(uint64(id), 10)
	known[id] = number
	_ = scan(file, fields, func(parts []string) bool {
		if parts[2] == number {
			known[id] = strings.ToValidUTF8(parts[0], "\uFFFD")
		}
		return parts[2] != number
	})
	return known[id]
}

// scan calls each with the fields of every well-formed line until it returns false. A missing
// file has no lines.
func scan(file string, fields int, each func([]string) bool) error {
	opened, err := os.Open(file)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer opened.Close()
	lines := bufio.NewScanner(opened)
	lines.Buffer(nil, maxLine)
	for lines.Scan() {
		parts := strings.Split(lines.Text(), ":")
		if len(parts) >= fields && !each(parts) {
			break
		}
	}
	return lines.Err()
}

// Resolve makes a path absolute: ~ and relative paths start at base, or at the home directory.
func (u *User) Resolve(name, base string) string {
	if base == "" {
		base = u.Home
	}
	switch {
	case name == "":
		return base
	case name == "~":
		return u.Home
	case strings.HasPrefix(name, "~/"):
		return path.Join(u.Home, name[2:])
	case path.IsAbs(name):
		return path.Clean(name)
	}
	return path.Join(base, name)
}

// Credential is what a child process of this user is started with.
func (u *User) Credential() *syscall.Credential {
	return &syscall.Credential{Uid: u.UID, Gid: u.GID, Groups: u.Groups}
}

// rootOnly is set when this process may not change users (a developer's machine).
var rootOnly = sync.OnceValue(func() bool { return os.Geteuid() != 0 })

// As runs work with the file system rights of the user.
//
// The kernel keeps these ids per thread. The thread is not given back to the runtime: it ends
// with its goroutine, so no other work can ever run with changed rights.
func (u *User) As(work func() error) error {
	if u.UID == uint32(os.Geteuid()) || rootOnly() {
		return work()
	}
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if err := u.assume(); err != nil {
			result <- err
			return
		}
		result <- work()
	}()
	return <-result
}

func (u *User) assume() error {
	// unix.Setgroups would change every thread of the process.
	groups := u.Groups
	if len(groups) == 0 {
		groups = []uint32{u.GID}
	}
	_, _, errno := syscall.RawSyscall(unix.SYS_SETGROUPS, uintptr(len(groups)), uintptr(unsafe.Pointer(&groups[0])), 0)
	if errno != 0 {
		return fmt.Errorf("setgroups: %w", errno)
	}
	if _, err := unix.SetfsgidRetGid(int(u.GID)); err != nil {
		return fmt.Errorf("setfsgid: %w", err)
	}
	if _, err := unix.SetfsuidRetUid(int(u.UID)); err != nil {
		return fmt.Errorf("setfsuid: %w", err)
	}
	return nil
}
