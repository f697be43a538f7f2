package files

import (
	"errors"
	"io"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Block is what content is moved in. Where it is large it goes past the page cache: through it,
// each page costs more than its disk does, and stays behind as memory that every pause, fork and
// snapshot of the machine then has to carry.
type Block struct {
	// Begins at a page, as direct input and output demand.
	bytes []byte
}

// BlockSize is how much a block holds.
const BlockSize = 1 << 20

// NewBlock returns one to be given back by Free.
func NewBlock() (*Block, error) {
	bytes, err := unix.Mmap(-1, 0, BlockSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, err
	}
	return &Block{bytes}, nil
}

// Free gives its memory back.
func (b *Block) Free() {
	_ = unix.Munmap(b.bytes)
}

// writeTo writes the first n bytes; only whole blocks have gone to this file before.
func (b *Block) writeTo(file *os.File, n int) error {
	written := 0
	if n == len(b.bytes) && setDirect(file, true) {
		var err error
		written, err = file.Write(b.bytes)
		// Not every file system that takes the flag can do it, nor after a short write.
		if !errors.Is(err, unix.EINVAL) {
			return err
		}
	}
	setDirect(file, false)
	_, err := file.Write(b.bytes[written:n])
	return err
}

// Load reads the beginning of a file, as much as there is and fits.
func (b *Block) Load(file *os.File) ([]byte, error) {
	n, err := io.ReadFull(file, b.bytes)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		err = nil
	}
	return b.bytes[:n], err
}

// Send copies the next size bytes of a file. What is not in memory goes past the page cache.
func Send(to io.Writer, file *os.File, size int64) error {
	sent := &counter{to: to}
	if size < BlockSize || cached(file, size/2) || !sendDirect(sent, file, size) {
		_, err := io.CopyN(sent, file, size)
		return err
	}
	if sent.err == nil && sent.n < size {
		return io.ErrUnexpectedEOF
	}
	return sent.err
}

// counter counts what is written, and keeps the error of that.
type counter struct {
	to  io.Writer
	n   int64
	err error
}

func (c *counter) Write(content []byte) (n int, err error) {
	n, c.err = c.to.Write(content)
	c.n += int64(n)
	return n, c.err
}

// sendDirect copies size bytes of a file, from where it stands, past the page cache; false when
// that cannot be done and nothing was read.
func sendDirect(to io.Writer, file *os.File, size int64) bool {
	if !setDirect(file, true) {
		return false
	}
	block, err := NewBlock()
	if err != nil {
		return !setDirect(file, false)
	}
	defer block.Free()
	for first := true; size > 0; first = false {
		n, err := file.Read(block.bytes)
		if first && errors.Is(err, unix.EINVAL) {
			return !setDirect(file, false)
		}
		// A file that shrinks meanwhile cuts the answer short, which the client notices.
		n = int(min(int64(n), size))
		if _, sendErr := to.Write(block.bytes[:n]); err != nil || sendErr != nil {
			return true
		}
		size -= int64(n)
	}
	return true
}

// cached tells whether what a file has at an offset is in memory. To ask by reading would put it
// there.
func cached(file *os.File, offset int64) bool {
	page := int64(os.Getpagesize())
	mapped, err := unix.Mmap(int(file.Fd()), offset/page*page, int(page), unix.PROT_NONE, unix.MAP_SHARED)
	if err != nil {
		return true
	}
	defer func() { _ = unix.Munmap(mapped) }()
	var resident [1]byte
	address, answer := unsafe.Pointer(unsafe.SliceData(mapped)), unsafe.Pointer(&resident)
	if _, _, failed := unix.Syscall(unix.SYS_MINCORE, uintptr(address), uintptr(page), uintptr(answer)); failed != 0 {
		return true
	}
	return resident[0]&1 != 0
}

// setDirect has a file read and written past the page cache or through it, and tells which.
func setDirect(file *os.File, direct bool) bool {
	flags, err := unix.FcntlInt(file.Fd(), unix.F_GETFL, 0)
	if err != nil {
		return false
	}
	now := flags&unix.O_DIRECT != 0
	if now == direct {
		return now
	}
	if _, err = unix.FcntlInt(file.Fd(), unix.F_SETFL, flags^unix.O_DIRECT); err != nil {
		return now
	}
	return direct
}
