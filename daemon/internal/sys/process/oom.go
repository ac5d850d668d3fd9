package process

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
)

// oomScoreFile decides which process the kernel kills when memory runs out: the one with the highest value and the most
// memory. Child processes inherit the value.
const oomScoreFile = "/proc/self/oom_score_adj"

// protectedOOMScore is the value of a protected process. When the kernel chooses what to kill, it then assumes that the
// process uses less memory than it does, by half of the host's memory.
const protectedOOMScore = -500

// ProtectFromOOM makes the kernel kill other processes first when memory runs out, such as those of the sandboxes that use
// it. It does nothing if a score is already set, for example by systemd. It needs CAP_SYS_RESOURCE. Start child processes
// that must not be protected in WithoutOOMProtection.
func ProtectFromOOM() error {
	f, err := openOOMScore()
	if err == nil && readOOMScore(f) == "0" {
		_, err = f.WriteAt([]byte(strconv.Itoa(protectedOOMScore)), 0)
	}
	if err != nil {
		return fmt.Errorf("protect this process when memory runs out: %w", err)
	}
	return nil
}

// openOOMScore opens the file once, because it is used for each process that starts.
var openOOMScore = sync.OnceValues(func() (*os.File, error) { return os.OpenFile(oomScoreFile, os.O_RDWR, 0) })

func readOOMScore(f *os.File) string {
	buf := make([]byte, 16)
	n, _ := f.ReadAt(buf, 0)
	return strings.TrimSpace(string(buf[:n]))
}

var oomMu sync.Mutex // held while this process has no protection

// WithoutOOMProtection calls fork, which starts a child process, while this process has no protection. So the child has
// none from the beginning: a child that forks at once would pass it on. If this process may not change its score, the
// child inherits it.
func WithoutOOMProtection(fork func() error) error {
	oomMu.Lock()
	defer oomMu.Unlock()
	f, err := openOOMScore()
	if err != nil {
		return fork()
	}
	score := readOOMScore(f)
	if strings.HasPrefix(score, "-") {
		if _, err := f.WriteAt([]byte("0"), 0); err == nil {
			defer func() { _, _ = f.WriteAt([]byte(score), 0) }()
		}
	}
	return fork()
}
