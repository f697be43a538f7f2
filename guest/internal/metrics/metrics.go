// Package metrics tells what the VM uses, in the form E2B's clients read.
package metrics

import (
	"bufio"
	"encoding/json"
	"net/http"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Sample is one reading. Sizes are bytes unless their name ends in _mib.
type Sample struct {
	Timestamp   int64   `json:"ts"`
	CPUCount    int     `json:"cpu_count"`
	CPUUsedPct  float64 `json:"cpu_used_pct"`
	MemTotal    uint64  `json:"mem_total"`
	MemUsed     uint64  `json:"mem_used"`
	MemCache    uint64  `json:"mem_cache"`
	MemTotalMiB uint64  `json:"mem_total_mib"`
	MemUsedMiB  uint64  `json:"mem_used_mib"`
	DiskTotal   uint64  `json:"disk_total"`
	DiskUsed    uint64  `json:"disk_used"`
}

// Meter reads the machine; CPU use is counted from one reading to the next.
type Meter struct {
	mu          sync.Mutex
	busy, total uint64
}

// Read takes a sample.
func (m *Meter) Read() Sample {
	s := Sample{Timestamp: time.Now().Unix(), CPUCount: runtime.NumCPU(), CPUUsedPct: m.cpu()}
	memory := meminfo()
	s.MemTotal, s.MemCache = memory["MemTotal"], memory["Cached"]
	s.MemUsed = s.MemTotal - min(s.MemTotal, memory["MemAvailable"])
	s.MemTotalMiB, s.MemUsedMiB = s.MemTotal>>20, s.MemUsed>>20
	var fs unix.Statfs_t
	if unix.Statfs("/", &fs) == nil {
		s.DiskTotal = fs.Blocks * uint64(fs.Bsize)
		s.DiskUsed = (fs.Blocks - fs.Bfree) * uint64(fs.Bsize)
	}
	return s
}

// ServeHTTP answers with a sample as JSON.
func (m *Meter) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(m.Read())
}

func (m *Meter) cpu() float64 {
	content, _ := os.ReadFile("/proc/stat")
	line, _, _ := strings.Cut(string(content), "\n")
	fields := strings.Fields(line)
	var busy, total uint64
	for i, field := range fields[min(1, len(fields)):] {
		value, _ := strconv.ParseUint(field, 10, 64)
		total += value
		// idle and iowait, proc(5)
		if i != 3 && i != 4 {
			busy += value
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	since, used := total-m.total, busy-m.busy
	m.total, m.busy = total, busy
	if since == 0 {
		return 0
	}
	return 100 * float64(used) / float64(since)
}

func meminfo() map[string]uint64 {
	values := map[string]uint64{}
	file, err := os.Open("/proc/meminfo")
	if err != nil {
		return values
	}
	defer file.Close()
	for lines := bufio.NewScanner(file); lines.Scan(); {
		name, rest, _ := strings.Cut(lines.Text(), ":")
		kib, _ := strconv.ParseUint(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 64)
		values[name] = kib << 10
	}
	return values
}
