package process

import (
	"os"
	"path/filepath"
	"strconv"
	"sync"
)

// cgroups are the control groups of started processes: one each, so that SIGKILL finds all that a
// process started, whatever sessions those made. There are none where root is empty, or the kernel
// offers none there.
type cgroups struct {
	root string

	mu   sync.Mutex
	next uint64
	// Made ahead for the process that is started next.
	spare group
	// Groups of ended processes that left others behind.
	busy map[string]struct{}
}

// group is one control group, opened; an empty one is none.
type group struct {
	path   string
	opened *os.File
}

func (g group) close() {
	if g.opened != nil {
		_ = g.opened.Close()
	}
}

func (g group) removed() bool {
	if g.opened == nil {
		return false
	}
	_, err := os.Stat(g.path)
	return err != nil
}

// prepare makes the next process's group ahead.
func (c *cgroups) prepare() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.spare.opened == nil {
		c.spare = c.make()
	}
}

// take returns a group for one process.
func (c *cgroups) take() group {
	c.mu.Lock()
	defer c.mu.Unlock()
	taken := c.spare
	c.spare = group{}
	if taken.opened == nil {
		taken = c.make()
	}
	return taken
}

// create returns a group that was not made ahead.
func (c *cgroups) create() group {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.make()
}

func (c *cgroups) make() group {
	if c.root == "" {
		return group{}
	}
	if _, err := os.Stat(filepath.Join(c.root, "cgroup.controllers")); err != nil {
		return group{}
	}
	c.next++
	// An agent that ended may have left its own behind.
	name := "process-" + strconv.Itoa(os.Getpid()) + "-" + strconv.FormatUint(c.next, 10)
	path := filepath.Join(c.root, name)
	if err := os.Mkdir(path, 0o755); err != nil {
		return group{}
	}
	opened, err := os.Open(path)
	if err != nil {
		_ = os.Remove(path)
		return group{}
	}
	return group{path, opened}
}

// release removes a group, now or once the processes that were left behind in it have ended.
func (c *cgroups) release(path string) {
	if path == "" {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.busy == nil {
		c.busy = map[string]struct{}{}
	}
	c.busy[path] = struct{}{}
	for left := range c.busy {
		if err := os.Remove(left); err == nil || os.IsNotExist(err) {
			delete(c.busy, left)
		}
	}
}
