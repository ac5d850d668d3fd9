package store

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"os"
)

// bbolt trusts its pages: of a file that a disk damaged it panics, also in goroutines of its own, reads
// beyond the mapping, or writes over what is in use. So the form of the file is checked before bbolt
// sees it: that each page is what it says, lies within the file and is used once, that keys are in order,
// and that what is free is not in use. It says nothing of the values; their checksums do.
//
// The format, in the byte order of the host: pages of one size, the first two of which hold the state of
// the last two transactions; a tree of branch and leaf pages, at whose root are the buckets, each a tree
// of its own or, while it is small, a leaf within its value; and a list of the pages that are free.
const (
	metaMagic   = 0xED0CDAED
	metaVersion = 2

	flagBranch   = 0x01
	flagLeaf     = 0x02
	flagMeta     = 0x04
	flagFreelist = 0x10

	flagBucket = 0x01 // of an element of a leaf

	pageHeaderSize = 16 // id uint64, flags, count uint16, overflow uint32
	elementSize    = 16
	metaSize       = 64
	bucketSize     = 16 // root, sequence uint64; what lies within the value follows
	noFreelist     = 1<<64 - 1
	longFreelist   = 0xFFFF // the count is too long for its field, and comes first in the list
)

var order = binary.NativeEndian

// metaPage is the state of the file after a transaction.
type metaPage struct {
	pageSize                  int64
	root, freelist, end, txid uint64 // end is the first page that was never used
}

// pages is a file under check.
type pages struct {
	file io.ReaderAt
	metaPage
	used []bool
}

// checkPages checks a bbolt file. If one of the two states is unreadable, the file as a whole is good as
// of the other, and fellBack is true: bbolt takes it to be cut short by a crash.
func checkPages(path string) (fellBack bool, err error) {
	file, err := os.Open(path)
	if err != nil {
		return false, err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return false, err
	}
	meta, fellBack, err := latestMeta(file)
	if err != nil {
		return false, err
	}
	if need := int64(meta.end); meta.end > uint64(info.Size()) || need*meta.pageSize > info.Size() {
		return false, fmt.Errorf("%d bytes are not %d pages: cut off", info.Size(), need)
	}
	p := &pages{file: file, metaPage: meta, used: make([]bool, meta.end)}
	if err := p.tree(meta.root, nil, nil, flagBucket); err != nil {
		return false, err
	}
	return fellBack, p.freePages()
}

func latestMeta(file io.ReaderAt) (latest metaPage, fellBack bool, err error) {
	first, ok := readMeta(file, 0)
	if !ok {
		for size := int64(1 << 10); size <= 1<<16; size *= 2 {
			if second, ok := readMeta(file, size); ok && second.pageSize == size {
				return second, true, nil
			}
		}
		return latest, false, errors.New("not a store")
	}
	second, ok := readMeta(file, first.pageSize)
	if !ok || second.pageSize != first.pageSize {
		return first, true, nil
	}
	if second.txid > first.txid {
		return second, false, nil
	}
	return first, false, nil
}

func readMeta(file io.ReaderAt, at int64) (m metaPage, ok bool) {
	b := make([]byte, pageHeaderSize+metaSize)
	if _, err := file.ReadAt(b, at); err != nil {
		return m, false
	}
	b = b[pageHeaderSize:]
	sum := fnv.New64a()
	sum.Write(b[:56])
	m = metaPage{
		pageSize: int64(order.Uint32(b[8:])),
		root:     order.Uint64(b[16:]),
		freelist: order.Uint64(b[32:]),
		end:      order.Uint64(b[40:]),
		txid:     order.Uint64(b[48:]),
	}
	ok = order.Uint32(b) == metaMagic && order.Uint32(b[4:]) == metaVersion && order.Uint64(b[56:]) == sum.Sum64() &&
		m.pageSize >= 1<<10 && m.pageSize <= 1<<16
	return m, ok
}

// rewriteState writes the state of a transaction to where it is already, and waits for the disk.
func rewriteState(path string, id, pageSize int) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	at, b := int64(id%2)*int64(pageSize), make([]byte, pageSize)
	if meta, ok := readMeta(f, at); !ok || meta.txid != uint64(id) {
		return errors.Join(fmt.Errorf("transaction %d is not in %s", id, path), f.Close())
	}
	if _, err = f.ReadAt(b, at); err == nil {
		_, err = f.WriteAt(b, at)
	}
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// page is a page with those that it overflows into, or a leaf within a value.
type page struct {
	flags uint16
	count int
	data  []byte // with the header
}

// read takes a page into use.
func (p *pages) read(id uint64) (page, error) {
	bad := func(format string, a ...any) (page, error) {
		return page{}, fmt.Errorf("page %d: %w", id, fmt.Errorf(format, a...))
	}
	if id < 2 || id >= p.end {
		return bad("not one of %d pages", p.end)
	}
	data := make([]byte, p.pageSize)
	if _, err := p.file.ReadAt(data, int64(id)*p.pageSize); err != nil {
		return bad("%w", err)
	}
	n := 1 + uint64(order.Uint32(data[12:]))
	if own := order.Uint64(data); own != id {
		return bad("says that it is page %d", own)
	}
	if n > p.end-id {
		return bad("%d pages long, behind the end", n)
	}
	if err := p.use(id, n); err != nil {
		return page{}, err
	}
	if n > 1 {
		data = make([]byte, int64(n)*p.pageSize)
		if _, err := p.file.ReadAt(data, int64(id)*p.pageSize); err != nil {
			return bad("%w", err)
		}
	}
	return page{flags: order.Uint16(data[8:]), count: int(order.Uint16(data[10:])), data: data}, nil
}

func (p *pages) use(id, n uint64) error {
	for ; n > 0; id, n = id+1, n-1 {
		if p.used[id] {
			return fmt.Errorf("page %d: used twice", id)
		}
		p.used[id] = true
	}
	return nil
}

// tree checks a page and what is below it. Its keys lie from min to before max, where these are not nil;
// the elements of its leaves have the flags.
func (p *pages) tree(id uint64, min, max []byte, flags uint32) error {
	pg, err := p.read(id)
	if err != nil {
		return err
	}
	switch {
	case pg.flags == flagLeaf:
		err = p.leaf(pg, min, max, flags)
	case pg.flags == flagBranch && pg.count > 0:
		err = p.branch(pg, min, max, flags)
	default:
		err = fmt.Errorf("of type %#x with %d elements", pg.flags, pg.count)
	}
	if err != nil {
		return fmt.Errorf("page %d: %w", id, err)
	}
	return nil
}

func (p *pages) branch(pg page, min, max []byte, flags uint32) error {
	keys := make([][]byte, pg.count)
	for i := range keys {
		e, err := pg.element(i)
		if err != nil {
			return err
		}
		if keys[i], err = pg.slice(i, order.Uint32(e), order.Uint32(e[4:])); err != nil {
			return err
		}
	}
	if err := inOrder(keys, min, max); err != nil {
		return err
	}
	for i, key := range keys {
		e, _ := pg.element(i)
		below := max
		if i+1 < len(keys) {
			below = keys[i+1]
		}
		if err := p.tree(order.Uint64(e[8:]), key, below, flags); err != nil {
			return err
		}
	}
	return nil
}

func (p *pages) leaf(pg page, min, max []byte, flags uint32) error {
	keys := make([][]byte, pg.count)
	for i := range keys {
		e, err := pg.element(i)
		if err != nil {
			return err
		}
		if got := order.Uint32(e); got != flags {
			return fmt.Errorf("element %d has flags %#x", i, got)
		}
		pos, keySize, valueSize := order.Uint32(e[4:]), order.Uint32(e[8:]), order.Uint32(e[12:])
		if keys[i], err = pg.slice(i, pos, keySize); err != nil {
			return err
		}
		value, err := pg.slice(i, pos+keySize, valueSize)
		if err != nil {
			return err
		}
		if flags == flagBucket {
			if err := p.bucket(value); err != nil {
				return fmt.Errorf("bucket %q: %w", keys[i], err)
			}
		}
	}
	return inOrder(keys, min, max)
}

func (p *pages) bucket(value []byte) error {
	if len(value) < bucketSize {
		return errors.New("too short")
	}
	if root := order.Uint64(value); root != 0 {
		return p.tree(root, nil, nil, 0)
	}
	inline := value[bucketSize:]
	if len(inline) < pageHeaderSize {
		return errors.New("too short")
	}
	pg := page{flags: order.Uint16(inline[8:]), count: int(order.Uint16(inline[10:])), data: inline}
	if order.Uint64(inline) != 0 || pg.flags != flagLeaf || order.Uint32(inline[12:]) != 0 {
		return errors.New("not a leaf")
	}
	return p.leaf(pg, nil, nil, 0)
}

func (pg page) element(i int) ([]byte, error) {
	at := pageHeaderSize + i*elementSize
	if at+elementSize > len(pg.data) {
		return nil, fmt.Errorf("element %d lies behind the end", i)
	}
	return pg.data[at : at+elementSize], nil
}

// slice is n bytes at pos, which counts from the beginning of element i.
func (pg page) slice(i int, pos, n uint32) ([]byte, error) {
	at := uint64(pageHeaderSize+i*elementSize) + uint64(pos)
	if at+uint64(n) > uint64(len(pg.data)) || at < uint64(pageHeaderSize+pg.count*elementSize) {
		return nil, fmt.Errorf("element %d is not within the page", i)
	}
	return pg.data[at : at+uint64(n)], nil
}

func inOrder(keys [][]byte, min, max []byte) error {
	for i, key := range keys {
		if i == 0 && bytes.Compare(key, min) < 0 || i > 0 && bytes.Compare(key, keys[i-1]) <= 0 ||
			max != nil && bytes.Compare(key, max) >= 0 {
			return fmt.Errorf("key %q is out of order", key)
		}
	}
	return nil
}

// freePages checks that no page of the free ones is in use, or there twice.
func (p *pages) freePages() error {
	if p.freelist == noFreelist {
		return nil
	}
	pg, err := p.read(p.freelist)
	if err != nil {
		return err
	}
	list, n := pg.data[pageHeaderSize:], uint64(pg.count)
	if n == longFreelist {
		n, list = order.Uint64(list), list[8:]
	}
	if pg.flags != flagFreelist || n > uint64(len(list)/8) {
		return fmt.Errorf("page %d: not a list of %d free pages", p.freelist, n)
	}
	for i := range n {
		id := order.Uint64(list[i*8:])
		if id < 2 || id >= p.end {
			return fmt.Errorf("free page %d: not one of %d pages", id, p.end)
		}
		if err := p.use(id, 1); err != nil {
			return err
		}
	}
	return nil
}
