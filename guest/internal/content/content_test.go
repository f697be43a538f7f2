package content

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestAFileIsReadWholeUpToItsLimit(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	for _, size := range []int{0, 1, firstRead - 1, firstRead, firstRead + 1, 3 * firstRead, 100_000} {
		text := strings.Repeat("x", size)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		for _, limit := range []int{size, size + 1, 1 << 20} {
			if got, err := Read(path, limit); err != nil || string(got) != text {
				t.Errorf("%d bytes with a limit of %d: %d bytes, %v", size, limit, len(got), err)
			}
		}
		if _, err := Read(path, size-1); size > 0 && !errors.Is(err, unix.EFBIG) {
			t.Errorf("%d bytes with a limit of %d: %v", size, size-1, err)
		}
	}
	if _, err := Read(path+".none", 1); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("one that is not there: %v", err)
	}
	// A file that does not tell its size.
	if got, err := Read("/proc/self/status", 1<<16); err != nil || !strings.HasPrefix(string(got), "Name:") {
		t.Errorf("%q %v", got, err)
	}
}

func TestAFileIsReplacedInPlace(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	var first unix.Stat_t
	for n, text := range []string{"short\n", "a longer one\n", "short\n", ""} {
		if err := Replace(path, text, 0o640); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(path); err != nil || string(got) != text {
			t.Errorf("%q %v", got, err)
		}
		var now unix.Stat_t
		if err := unix.Stat(path, &now); err != nil {
			t.Fatal(err)
		}
		if n == 0 {
			first = now
		}
		if now.Ino != first.Ino || now.Mode&0o777 != 0o640 {
			t.Errorf("it is another file, or its mode is %o", now.Mode)
		}
	}
	if err := Replace(filepath.Join(path, "below"), "x", 0o600); !errors.Is(err, unix.ENOTDIR) {
		t.Errorf("below a file: %v", err)
	}
}

func TestOnlyAFileThatIsThereIsWrittenTo(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	if err := Write(path, "text"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("one that is not there: %v", err)
	}
	if err := os.WriteFile(path, []byte("12345"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Write(path, "abc"); err != nil {
		t.Fatal(err)
	}
	if got, _ := os.ReadFile(path); string(got) != "abc45" {
		t.Errorf("got %q", got)
	}
}
