package process

import (
	"fmt"
	"os"
	"path/filepath"
	"sync"
)

// cgroups are the control groups of started processes: one each, so that SIGKILL finds all that a
// process started, whatever sessions those made. There are none where root is empty, or the kernel
// offers none there.
type cgroups struct {
	root string

	mu   sync.Mutex
	next uint64
	// Groups of ended processes that left others behind.
	busy map[string]struct{}
}

func (c *cgroups) create() (string, *os.File) {
	if c.root == "" {
		return "", nil
	}
	if _, err := os.Stat(filepath.Join(c.root, "cgroup.controllers")); err != nil {
		return "", nil
	}
	c.mu.Lock()
	c.next++
	// An agent that ended may have left its own behind.
	path := filepath.Join(c.root, fmt.Sprintf("process-%d-%d", os.Getpid(), c.next))
	c.mu.Unlock()
	if err := os.Mkdir(path, 0o755); err != nil {
		return "", nil
	}
	opened, err := os.Open(path)
	if err != nil {
		_ = os.Remove(path)
		return "", nil
	}
	return path, opened
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
