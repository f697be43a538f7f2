// Package metadata keeps what a client says of a file with the file, as E2B's clients know it:
// headers X-Metadata-<key> of an upload, extended attributes user.e2b.<key> on the disk.
//
// Anybody in the guest may set such attributes, so what is read is bounded and made text.
package metadata

import (
	"errors"
	"fmt"
	"maps"
	"net/http"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	header    = "X-Metadata-"
	attribute = "user.e2b."
	// Of all keys and values of one file.
	maxBytes = 4 << 10
	// A file may have other attributes too; the names of all are at most 64 KiB, listxattr(2).
	maxNames = 64 << 10
	// The longest name the kernel takes.
	maxName = 255
)

// ErrInvalid is wrapped by errors about what a client wants kept.
var ErrInvalid = errors.New("the metadata is invalid")

// FromHeaders returns what an upload wants kept with its file; nil is nothing.
func FromHeaders(headers http.Header) (map[string]string, error) {
	var found map[string]string
	size := 0
	for name, values := range headers {
		key, ok := strings.CutPrefix(name, header)
		if !ok {
			continue
		}
		// The server has checked that a header's name is one; it has lost its case on the way.
		key, value := strings.ToLower(key), values[0]
		if key == "" || len(attribute+key) > maxName || len(values) != 1 || !printable(value) {
			return nil, fmt.Errorf("%w: key '%s' must have one value of printable ASCII", ErrInvalid, key)
		}
		if size += len(key) + len(value); size > maxBytes {
			return nil, fmt.Errorf("%w: it has more than %d bytes", ErrInvalid, maxBytes)
		}
		if found == nil {
			found = map[string]string{}
		}
		found[key] = value
	}
	return found, nil
}

func printable(text string) bool {
	return !strings.ContainsFunc(text, func(r rune) bool { return r < ' ' || r > '~' })
}

// Replace has the file keep wanted and nothing that it was told before.
func Replace(file *os.File, wanted map[string]string) error {
	fd := int(file.Fd())
	names, err := list(func(buffer []byte) (int, error) { return unix.Flistxattr(fd, buffer) })
	if err != nil && len(wanted) == 0 {
		return nil // a file system without attributes has none to forget
	}
	for _, name := range names {
		if _, kept := wanted[strings.TrimPrefix(name, attribute)]; kept {
			continue
		}
		if err := unix.Fremovexattr(fd, name); err != nil && !errors.Is(err, unix.ENODATA) {
			return fmt.Errorf("metadata: %w", err)
		}
	}
	for _, key := range slices.Sorted(maps.Keys(wanted)) {
		err := unix.Fsetxattr(fd, attribute+key, []byte(wanted[key]), 0)
		if errors.Is(err, unix.EOPNOTSUPP) {
			return fmt.Errorf("%w: this file system keeps none", ErrInvalid)
		}
		if err != nil {
			return fmt.Errorf("metadata: %w", err)
		}
	}
	return nil
}

// Read returns what the file at path, links followed, was told; nil is nothing. What cannot be
// read, or is more than a client may have said, is left out.
func Read(path string) map[string]string {
	names, err := list(func(buffer []byte) (int, error) { return unix.Listxattr(path, buffer) })
	if err != nil || len(names) == 0 {
		return nil
	}
	found, buffer, left := map[string]string{}, make([]byte, maxBytes), maxBytes
	for _, name := range names {
		key := strings.TrimPrefix(name, attribute)
		n, err := unix.Getxattr(path, name, buffer[:left])
		if err != nil || len(key)+n > left {
			continue
		}
		left -= len(key) + n
		found[text(key)] = text(string(buffer[:n]))
	}
	return found
}

func text(given string) string { return strings.ToValidUTF8(given, "\uFFFD") }

// list returns the names of the attributes that are ours.
func list(read func([]byte) (int, error)) ([]string, error) {
	var few [256]byte
	buffer := few[:]
	n, err := read(buffer)
	if errors.Is(err, unix.ERANGE) {
		buffer = make([]byte, maxNames)
		n, err = read(buffer)
	}
	if err != nil {
		return nil, err
	}
	var found []string
	for name := range strings.SplitSeq(string(buffer[:n]), "\x00") {
		if len(name) > len(attribute) && strings.HasPrefix(name, attribute) {
			found = append(found, name)
		}
	}
	return found, nil
}
