package files

import (
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"sandmartin.dev/guest/internal/users"
)

const (
	chunkSize = 256 << 10
	// A file that was changed so lately may be changed again within its clock's tick.
	settled = 2 * time.Second
)

func download(w http.ResponseWriter, r *http.Request, at places, given string) error {
	user, path, err := at.find(given)
	if err != nil {
		return err
	}
	file, info, err := open(user, path)
	if err != nil {
		return err
	}
	defer file.Close()
	header := w.Header()
	header.Set("Content-Type", "application/octet-stream")
	header.Set("Vary", "Accept-Encoding")
	header.Set("Last-Modified", info.ModTime().UTC().Format(http.TimeFormat))
	switch {
	case conditional(r.Header):
		return sendPart(w, r, file, info)
	case wantsGzip(r.Header):
		return sendPacked(w, r, file, info.Size())
	}
	header.Set("Accept-Ranges", "bytes")
	header.Set("ETag", tag(info))
	return send(w, file, info.Size())
}

// open opens a regular file for reading.
func open(user *users.User, path string) (*os.File, fs.FileInfo, error) {
	var file *os.File
	var info fs.FileInfo
	err := user.As(func() (err error) {
		// Not blocking: opening a named pipe must not wait for its writer.
		if file, err = os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0); err == nil {
			info, err = file.Stat()
		}
		return err
	})
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("path '%s' %w", path, errNotRegular)
	}
	if err != nil && file != nil {
		_ = file.Close()
	}
	return file, info, err
}

// tag changes whenever the content does. It is weak while the content could still change
// unnoticed.
func tag(info fs.FileInfo) string {
	stat := info.Sys().(*syscall.Stat_t)
	changed := time.Unix(stat.Ctim.Unix())
	text := fmt.Sprintf(`"%x-%x-%x"`, stat.Ino, changed.UnixNano(), info.Size())
	if time.Since(changed) < settled {
		return "W/" + text
	}
	return text
}

// conditional tells whether a request may be answered otherwise than by the whole file.
func conditional(header http.Header) bool {
	for _, name := range []string{"Range", "If-Match", "If-None-Match", "If-Modified-Since", "If-Unmodified-Since"} {
		if header.Get(name) != "" {
			return true
		}
	}
	return false
}

// sendPart answers a request with a range or a condition. A short file is looked at first: files
// of the kernel have sizes that mean nothing.
func sendPart(w http.ResponseWriter, r *http.Request, file *os.File, info fs.FileInfo) error {
	start := make([]byte, chunkSize+1)
	n, err := io.ReadFull(file, start)
	whole := errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
	if err != nil && !whole {
		return err
	}
	if _, err := file.Seek(0, io.SeekStart); err != nil {
		return err
	}
	w.Header().Set("ETag", tag(info))
	switch {
	case whole:
		http.ServeContent(w, r, "", info.ModTime(), bytes.NewReader(start[:n]))
	case info.Size() <= chunkSize:
		return send(w, file, info.Size())
	default:
		http.ServeContent(w, r, "", info.ModTime(), file)
	}
	return nil
}

// wantsGzip tells whether the client takes gzip and likes nothing better, RFC 9110 12.5.3.
func wantsGzip(header http.Header) bool {
	weights := map[string]float64{}
	for part := range strings.SplitSeq(strings.Join(header.Values("Accept-Encoding"), ","), ",") {
		coding, parameter, _ := strings.Cut(strings.ToLower(part), ";")
		weight := 1.0
		if given, ok := strings.CutPrefix(strings.TrimSpace(parameter), "q="); ok {
			if parsed, err := strconv.ParseFloat(given, 64); err == nil {
				weight = parsed
			}
		}
		weights[strings.TrimSpace(coding)] = weight
	}
	gzipped, named := weights["gzip"]
	if !named {
		gzipped = weights["*"]
	}
	return gzipped > 0 && gzipped >= weights["identity"]
}

// sendPacked answers with the content packed; how long that is shows only at its end.
func sendPacked(w http.ResponseWriter, r *http.Request, file *os.File, size int64) error {
	w.Header().Set("Content-Encoding", "gzip")
	if r.Method == http.MethodHead {
		return nil
	}
	packer, err := gzip.NewWriterLevel(w, gzip.BestSpeed)
	if err == nil {
		err = pack(packer, file, size)
	}
	if err == nil {
		err = packer.Close()
	}
	if err != nil {
		// Its client must not take what came for the whole.
		panic(http.ErrAbortHandler)
	}
	return nil
}

func pack(to io.Writer, file *os.File, size int64) error {
	if size >= BlockSize {
		return Send(to, file, size)
	}
	// Files of the kernel have sizes that mean nothing.
	_, err := io.Copy(to, file)
	return err
}

// send answers with the content of a file. The size of a short one is what can be read: files of
// the kernel have sizes that mean nothing.
func send(w http.ResponseWriter, file *os.File, size int64) error {
	start := make([]byte, chunkSize)
	n, err := io.ReadFull(file, start)
	switch {
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		size = int64(n)
	case err != nil:
		return err
	}
	if size >= int64(n) {
		w.Header().Set("Content-Length", strconv.FormatInt(size, 10))
	}
	if _, err := w.Write(start[:n]); err != nil || size == int64(n) {
		return nil
	}
	if size < int64(n) {
		_, _ = io.Copy(w, file)
		return nil
	}
	left := size - int64(n)
	if left >= BlockSize && !cached(file, size/2) && sendDirect(w, file, left) {
		return nil
	}
	// A file that shrinks meanwhile cuts the answer short, which the client notices.
	_, _ = io.Copy(w, io.LimitReader(file, left))
	return nil
}
