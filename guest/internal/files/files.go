// Package files serves /files: content of any size, streamed in bounded memory, with the rights
// of the user who asks.
//
// An upload is written in place. One that fails is removed and reported, so a client never takes
// half a file for a whole one.
package files

import (
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"sandmartin.dev/guest/internal/users"
)

const (
	chunkSize = 256 << 10
	// Space an upload may not take, or this part of a small file system: the guest must go on
	// working on a full disk.
	reserve     = 16 << 20
	reservePart = 16
	// What st_blocks counts in, stat(2).
	statBlock = 512
	// How often the free space is looked at during an upload.
	checkEvery = 8 << 20
)

// Locate finds the account called name (empty is the default) and the absolute path meant.
type Locate func(name, path string) (*users.User, string, error)

// Handler serves GET and POST /files.
func Handler(locate Locate) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		query := r.URL.Query()
		path := query.Get("path")
		if path == "" || strings.ContainsRune(path, 0) {
			Refuse(w, http.StatusBadRequest, "the path is empty or contains a NUL character")
			return
		}
		user, path, err := locate(query.Get("username"), path)
		if err != nil {
			Refuse(w, http.StatusUnauthorized, err.Error())
			return
		}
		switch r.Method {
		case http.MethodGet:
			download(w, user, path)
		case http.MethodPost:
			upload(w, r, user, path)
		default:
			w.Header().Set("Allow", "GET, POST")
			Refuse(w, http.StatusMethodNotAllowed, "use GET or POST")
		}
	})
}

// Refuse answers with an error in the form E2B's clients read.
func Refuse(w http.ResponseWriter, status int, message string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(map[string]any{"code": status, "message": message})
}

func refuseError(w http.ResponseWriter, err error) {
	status := http.StatusInternalServerError
	switch {
	case errors.Is(err, fs.ErrNotExist):
		status = http.StatusNotFound
	case errors.Is(err, fs.ErrPermission):
		status = http.StatusForbidden
	case errors.Is(err, errNotRegular), errors.Is(err, syscall.EISDIR), errors.Is(err, syscall.ENOTDIR), errors.Is(err, syscall.ENAMETOOLONG), errors.Is(err, errCut):
		status = http.StatusBadRequest
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		status = http.StatusInsufficientStorage
		err = fmt.Errorf("not enough disk space: %w", err)
	case errors.Is(err, syscall.ETXTBSY), errors.Is(err, syscall.EROFS):
		status = http.StatusForbidden
	}
	Refuse(w, status, err.Error())
}

var (
	errNotRegular = errors.New("is not a regular file")
	errCut        = errors.New("the content is cut short or damaged")
)

func download(w http.ResponseWriter, user *users.User, path string) {
	var file *os.File
	var info fs.FileInfo
	err := user.As(func() (err error) {
		// Not blocking: opening a named pipe must not wait for its writer.
		if file, err = os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0); err == nil {
			info, err = file.Stat()
		}
		return err
	})
	if file != nil {
		defer file.Close()
	}
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("path '%s' %w", path, errNotRegular)
	}
	if err != nil {
		refuseError(w, err)
		return
	}
	send(w, file, info.Size())
}

// send answers with the content of a file. The size of a short one is what can be read: files of
// the kernel have sizes that mean nothing.
func send(w http.ResponseWriter, file *os.File, size int64) {
	start := make([]byte, chunkSize)
	n, err := io.ReadFull(file, start)
	switch {
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		size = int64(n)
	case err != nil:
		refuseError(w, err)
		return
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	if size >= int64(n) {
		w.Header().Set("Content-Length", strconv.FormatInt(size, 10))
	}
	if _, err := w.Write(start[:n]); err != nil || size == int64(n) {
		return
	}
	if size < int64(n) {
		_, _ = io.Copy(w, file)
		return
	}
	left := size - int64(n)
	if left >= blockSize && !cached(file, size/2) && sendDirect(w, file, left) {
		return
	}
	// A file that shrinks meanwhile cuts the answer short, which the client notices.
	_, _ = io.Copy(w, io.LimitReader(file, left))
}

func upload(w http.ResponseWriter, r *http.Request, user *users.User, path string) {
	kind, _, _ := strings.Cut(r.Header.Get("Content-Type"), ";")
	if strings.HasPrefix(kind, "multipart/") {
		Refuse(w, http.StatusUnsupportedMediaType, "multipart uploads are not supported yet; send application/octet-stream")
		return
	}
	body, announced := io.Reader(r.Body), r.ContentLength
	switch r.Header.Get("Content-Encoding") {
	case "", "identity":
	case "gzip":
		unpacked, err := gzip.NewReader(r.Body)
		if err != nil {
			Refuse(w, http.StatusBadRequest, "the body is not gzip: "+err.Error())
			return
		}
		// What is announced is the packed size.
		body, announced = unpacked, 0
	default:
		Refuse(w, http.StatusUnsupportedMediaType, "use Content-Encoding gzip or none")
		return
	}
	if err := store(user, path, body, announced); err != nil {
		refuseError(w, err)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode([]map[string]string{{"path": path, "name": filepath.Base(path), "type": "file"}})
}

// store writes the content; on failure nothing of it is left. What was there before is given up
// only once the announced content has space.
func store(user *users.User, path string, body io.Reader, announced int64) error {
	file, err := create(user, path, announced)
	if err != nil {
		return err
	}
	err = copyChecked(file, body)
	if err == nil {
		return file.Close()
	}
	withdraw(user, path, file)
	return err
}

// create opens the file for writing, and empties it if there will be space.
func create(user *users.User, path string, announced int64) (*os.File, error) {
	var file *os.File
	existed := false
	err := user.As(func() (err error) {
		if err = os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		info, statErr := os.Stat(path)
		existed = statErr == nil
		if existed && !info.Mode().IsRegular() {
			return fmt.Errorf("path '%s' %w", path, errNotRegular)
		}
		file, err = os.OpenFile(path, os.O_WRONLY|os.O_CREATE|unix.O_NONBLOCK, 0o644)
		return err
	})
	if err != nil {
		return nil, err
	}
	var stat unix.Stat_t
	if err = unix.Fstat(int(file.Fd()), &stat); err == nil && stat.Mode&unix.S_IFMT != unix.S_IFREG {
		err = fmt.Errorf("path '%s' %w", path, errNotRegular)
	}
	if err == nil {
		err = enoughSpace(file, announced-stat.Blocks*statBlock)
	}
	if err == nil {
		err = file.Truncate(0)
	}
	if err == nil {
		return file, nil
	}
	if existed {
		_ = file.Close()
	} else {
		withdraw(user, path, file)
	}
	return nil, err
}

// withdraw removes what an upload has left, at the end of whatever links lead there.
func withdraw(user *users.User, path string, file *os.File) {
	defer file.Close()
	_ = file.Truncate(0)
	mine, err := file.Stat()
	if err != nil {
		return
	}
	_ = user.As(func() error {
		target, err := filepath.EvalSymlinks(path)
		if err != nil {
			return err
		}
		if info, err := os.Lstat(target); err != nil || !os.SameFile(info, mine) {
			return err
		}
		return os.Remove(target)
	})
}

// content marks the errors of what a client sends, to tell them from those of the disk.
type content struct{ io.Reader }

func (c content) Read(buffer []byte) (int, error) {
	n, err := c.Reader.Read(buffer)
	if err != nil && !errors.Is(err, io.EOF) {
		err = fmt.Errorf("%w: %w", errCut, err)
	}
	return n, err
}

func copyChecked(to *os.File, from io.Reader) error {
	block, err := newBlock()
	if err != nil {
		return err
	}
	defer block.free()
	for unchecked := 0; ; {
		n, err := io.ReadFull(content{from}, block.bytes)
		// Compared as they are: content that is cut short wraps the same error.
		if err != nil && err != io.EOF && err != io.ErrUnexpectedEOF {
			return err
		}
		if writeErr := block.writeTo(to, n); writeErr != nil || err != nil {
			return writeErr
		}
		// What comes before the next look fits into what is kept free.
		if unchecked += n; unchecked >= checkEvery {
			if err := enoughSpace(to, 0); err != nil {
				return err
			}
			unchecked = 0
		}
	}
}

func enoughSpace(file *os.File, wanted int64) error {
	var stat unix.Statfs_t
	if err := unix.Fstatfs(int(file.Fd()), &stat); err != nil {
		return err
	}
	if stat.Blocks == 0 {
		return nil // the kernel's own files take no space
	}
	kept := min(reserve, int64(stat.Blocks)*stat.Bsize/reservePart)
	if left := int64(stat.Bavail) * stat.Bsize; max(wanted, 0)+kept > left {
		return fmt.Errorf("%d bytes are left, of which %d are kept free: %w", left, kept, syscall.ENOSPC)
	}
	return nil
}
