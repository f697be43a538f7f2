package files

import (
	"bytes"
	"compress/gzip"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"golang.org/x/sys/unix"

	"sandmartin.dev/guest/internal/users"
)

func serve(t *testing.T) string {
	t.Helper()
	return serveIdle(t, UploadIdle) + "/files?path="
}

func serveIdle(t *testing.T, idle time.Duration) string {
	t.Helper()
	me, err := users.Find(strconv.Itoa(os.Getuid()))
	if err != nil {
		t.Fatal(err)
	}
	locate := func(_ http.Header, _, path string) (*users.User, string, error) { return me, path, nil }
	mux := http.NewServeMux()
	mux.Handle("/files", Handler(locate, idle))
	mux.Handle("POST /files/compose", Composer(locate))
	server := httptest.NewServer(mux)
	t.Cleanup(server.Close)
	return server.URL
}

func post(t *testing.T, base, path string, body io.Reader, headers ...string) (int, string) {
	t.Helper()
	request, err := http.NewRequestWithContext(t.Context(), http.MethodPost, base+url.QueryEscape(path), body)
	if err != nil {
		t.Fatal(err)
	}
	for n := 0; n < len(headers); n += 2 {
		request.Header.Set(headers[n], headers[n+1])
	}
	answer, err := http.DefaultClient.Do(request)
	if err != nil {
		return 0, err.Error()
	}
	defer answer.Body.Close()
	content, _ := io.ReadAll(answer.Body)
	return answer.StatusCode, string(content)
}

func get(t *testing.T, base, path string) (int, []byte) {
	t.Helper()
	answer, err := http.Get(base + url.QueryEscape(path))
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	content, err := io.ReadAll(answer.Body)
	if err != nil {
		t.Fatal(err)
	}
	return answer.StatusCode, content
}

func packed(content []byte) []byte {
	var buffer bytes.Buffer
	packer := gzip.NewWriter(&buffer)
	_, _ = packer.Write(content)
	_ = packer.Close()
	return buffer.Bytes()
}

func TestContentOfManySizes(t *testing.T) {
	base, directory := serve(t), t.TempDir()
	for _, size := range []int{0, 1, chunkSize - 1, chunkSize, chunkSize + 1, checkEvery, checkEvery + 3} {
		content := bytes.Repeat([]byte("0123456789\x00\xff\n"), size/13+1)[:size]
		for name, body := range map[string][]byte{"plain": content, "gzip": packed(content)} {
			path := filepath.Join(directory, "made", name)
			encoding := map[string]string{"plain": "identity", "gzip": "gzip"}[name]
			if status, answer := post(t, base, path, bytes.NewReader(body), "Content-Encoding", encoding); status != http.StatusOK {
				t.Fatalf("%s of %d bytes: %d %s", name, size, status, answer)
			}
			if status, got := get(t, base, path); status != http.StatusOK || !bytes.Equal(got, content) {
				t.Errorf("%s of %d bytes: %d, %d bytes", name, size, status, len(got))
			}
		}
	}
}

func TestLargeContentStaysOutOfMemory(t *testing.T) {
	base, path := serve(t), filepath.Join(t.TempDir(), "file")
	content := bytes.Repeat([]byte("0123456789\x00\xff\n"), 300_000)
	if status, answer := post(t, base, path, bytes.NewReader(content)); status != http.StatusOK {
		t.Fatalf("%d %s", status, answer)
	}
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if !setDirect(file, true) {
		t.Skip("this file system has no direct input and output")
	}
	setDirect(file, false)
	middle := int64(len(content) / 2)
	for _, passed := range []string{"written", "read"} {
		if cached(file, middle) {
			t.Errorf("what was %s is in memory", passed)
		}
		if status, got := get(t, base, path); status != http.StatusOK || !bytes.Equal(got, content) {
			t.Errorf("%d, %d bytes", status, len(got))
		}
	}
	// What is in memory anyway is sent from there.
	if read, err := os.ReadFile(path); err != nil || !bytes.Equal(read, content) || !cached(file, middle) {
		t.Errorf("read %d bytes, %v", len(read), err)
	}
	if status, got := get(t, base, path); status != http.StatusOK || !bytes.Equal(got, content) {
		t.Errorf("%d, %d bytes", status, len(got))
	}
}

func TestFilesWhoseSizeMeansNothing(t *testing.T) {
	base := serve(t)
	for _, path := range []string{"/proc/self/status", "/proc/kallsyms", "/sys/kernel/mm/transparent_hugepage/enabled"} {
		expected, err := os.ReadFile(path)
		if err != nil {
			t.Logf("left out: %v", err)
			continue
		}
		if status, got := get(t, base, path); status != http.StatusOK || len(got) == 0 || len(got) < len(expected)/2 {
			t.Errorf("%s: %d, %d of %d bytes", path, status, len(got), len(expected))
		}
	}
}

func TestDamagedContentLeavesNothing(t *testing.T) {
	base, directory := serve(t), t.TempDir()
	whole := packed(bytes.Repeat([]byte("sand"), 1<<20))
	damaged := bytes.Clone(whole)
	damaged[len(damaged)-5] ^= 0xff // the checksum
	for name, body := range map[string]io.Reader{
		"cut gzip":          bytes.NewReader(whole[:len(whole)/2]),
		"damaged gzip":      bytes.NewReader(damaged),
		"no deflate inside": bytes.NewReader(append(bytes.Clone(whole[:10]), "garbage, garbage, garbage"...)),
	} {
		path := filepath.Join(directory, name)
		if status, answer := post(t, base, path, body, "Content-Encoding", "gzip"); status != http.StatusBadRequest {
			t.Errorf("%s: %d %s", name, status, answer)
		}
		if _, err := os.Lstat(path); err == nil {
			t.Errorf("%s left a file", name)
		}
	}
	// The end of a link is what was written, and what is taken away.
	link, target := filepath.Join(directory, "link"), filepath.Join(directory, "target")
	if err := os.WriteFile(target, []byte("old"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("target", link); err != nil {
		t.Fatal(err)
	}
	post(t, base, link, bytes.NewReader(damaged), "Content-Encoding", "gzip")
	if _, err := os.Stat(target); err == nil {
		t.Error("half of a file is left behind a link")
	}
}

func TestRefusals(t *testing.T) {
	base, directory := serve(t), t.TempDir()
	if err := unix.Mkfifo(filepath.Join(directory, "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(directory, "file")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name, path string
		read       int
		write      int
	}{
		{"nothing", "", 400, 400},
		{"NUL", "a\x00b", 400, 400},
		{"a directory", directory, 400, 400},
		{"a named pipe", filepath.Join(directory, "fifo"), 400, 400},
		{"a device", "/dev/zero", 400, 400},
		{"below a file", file + "/x", 400, 400},
		{"a long name", directory + "/" + strings.Repeat("x", 300), 400, 400},
		{"missing", filepath.Join(directory, "missing"), 404, 200},
	} {
		if status, body := get(t, base, c.path); status != c.read {
			t.Errorf("read %s: %d %s", c.name, status, body)
		}
		if status, body := post(t, base, c.path, strings.NewReader("x")); status != c.write {
			t.Errorf("write %s: %d %s", c.name, status, body)
		}
	}
	if status, _ := post(t, base, file, strings.NewReader("x"), "Content-Type", "multipart/form-data; boundary=x"); status != http.StatusBadRequest {
		t.Errorf("no form: %d", status)
	}
	if status, _ := post(t, base, file, strings.NewReader("x"), "Content-Encoding", "br"); status != http.StatusUnsupportedMediaType {
		t.Errorf("another encoding: %d", status)
	}
}

func TestAFullDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	disk := t.TempDir()
	if err := unix.Mount("none", disk, "tmpfs", 0, "size=16m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(disk, 0) })
	base, path := serve(t), filepath.Join(disk, "file")
	const size = 12 << 20
	content := bytes.Repeat([]byte("x"), size)
	if status, answer := post(t, base, path, bytes.NewReader(content)); status != http.StatusOK {
		t.Fatalf("%d %s", status, answer)
	}
	// It may replace itself, and is kept when what shall replace it cannot fit.
	if status, answer := post(t, base, path, bytes.NewReader(content)); status != http.StatusOK {
		t.Errorf("replacing: %d %s", status, answer)
	}
	if status, _ := post(t, base, path, bytes.NewReader(make([]byte, 64<<20))); status != 0 && status != http.StatusInsufficientStorage {
		t.Errorf("announced: %d", status)
	}
	if info, err := os.Stat(path); err != nil || info.Size() != size {
		t.Errorf("the old file is %v, %v", info, err)
	}
	// Not announced: found out on the way, by the look at the free space or by the disk itself.
	for range 3 {
		status, answer := post(t, base, filepath.Join(disk, "other"), iotest.DataErrReader(bytes.NewReader(content)))
		if status != http.StatusInsufficientStorage || !strings.Contains(answer, "not enough disk space") {
			t.Errorf("not announced: %d %s", status, answer)
		}
	}
	if entries, _ := os.ReadDir(disk); len(entries) != 1 {
		t.Errorf("left on the disk: %v", entries)
	}
}
