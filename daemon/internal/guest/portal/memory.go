package portal

import (
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/msbd/msbd/daemon/internal/sys/limit"
)

// maxTreeMemory limits what all calls of a fileServer together keep in memory for the files of trees, in bytes. A buffer of
// fixed size for each call does not count. It is enough for an archive with 200,000 directories.
const maxTreeMemory = 64 << 20

const (
	// perItem is what an item of a list needs in memory besides its text, in bytes.
	perItem = 32
	// perAttributes is what a file with attributes in a map needs besides its texts, in bytes.
	perAttributes = 160
)

// newTreeMemory returns the limit for all calls of a fileServer: maxTreeMemory, or an eighth of the machine's memory if
// that is less.
func newTreeMemory() *limit.Budget {
	size := uint64(maxTreeMemory)
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err == nil {
		size = min(size, info.Totalram*uint64(info.Unit)/8)
	}
	return limit.NewBudget(int(size), int(size))
}

// memory counts what a call keeps in memory for the files of a tree, or for a file. It is not safe for concurrent use, but its budget is.
type memory struct {
	budget *limit.Budget
	held   int // bytes
}

// hold adds n bytes. It returns a gRPC status if all calls together would keep too much.
func (m *memory) hold(n int) error {
	if m.budget.Hold("", n) != limit.Within {
		return status.Errorf(codes.ResourceExhausted,
			"the calls for files need more than the %d MiB of memory that the portal has for them: use a smaller tree, or try again when other calls have ended",
			m.budget.All>>20)
	}
	m.held += n
	return nil
}

// release subtracts n bytes.
func (m *memory) release(n int) {
	m.budget.Release("", n)
	m.held -= n
}

// close subtracts all bytes that are held.
func (m *memory) close() { m.release(m.held) }
