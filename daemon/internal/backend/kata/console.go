package kata

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/msbd/msbd/daemon/internal/backend/hypervisor"
	"github.com/msbd/msbd/daemon/internal/sys/tail"
)

const (
	// consoleLimit bounds a console's log: a guest can write as much as it likes.
	consoleLimit = 1 << 20
	// consolePause bounds how often a guest can make msbd read.
	consolePause = 50 * time.Millisecond
)

func (r *Runtime) consoleLog(id string) string { return filepath.Join(r.dir(id), "console.log") }

// consoleEnd returns what the guest said last.
func (r *Runtime) consoleEnd(id string) string { return tail.Read(r.consoleLog(id), 1<<10) }

// followConsole appends what the guest says on the console, which Kata's QEMU serves to one reader, to the
// sandbox's log until ctx or the microVM ends. What it said before the end is still read, unless ctx's cause is
// errReady. With await, it waits for the console to appear.
func (r *Runtime) followConsole(ctx context.Context, id string, await bool) {
	var console net.Conn
	dial := func() (err error) {
		console, err = net.Dial("unix", filepath.Join(vmRoot, id, "console.sock"))
		return err
	}
	if err := dial(); err != nil && (!await || poll(ctx, bootPoll, func() bool { return dial() == nil }) != nil) {
		return
	}
	defer console.Close()
	defer context.AfterFunc(ctx, func() {
		end := time.Now()
		if !errors.Is(context.Cause(ctx), errReady) {
			end = end.Add(lastWords)
		}
		_ = console.SetDeadline(end)
	})()
	log, err := os.OpenFile(r.consoleLog(id), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		r.Log.Warn("log the microVM's console", "id", id, "err", err)
		return
	}
	defer log.Close()
	buffer := make([]byte, 64<<10)
	for size := int64(0); ; {
		n, err := console.Read(buffer)
		if size += int64(n); size > consoleLimit {
			_ = log.Truncate(0)
			size = int64(n)
		}
		_, _ = log.Write(buffer[:n])
		if err != nil {
			return
		}
		select {
		case <-time.After(consolePause):
		case <-ctx.Done():
		}
	}
}

// watchConsole follows the console of a microVM that runs, and reports what it said if it ends by itself. Call the
// answer when it has ended.
func (r *Runtime) watchConsole(ctx context.Context, id string) (done func()) {
	ctx, stop := context.WithCancel(ctx)
	var follower sync.WaitGroup
	follower.Go(func() { r.followConsole(ctx, id, false) })
	return func() {
		running := ctx.Err() == nil
		stop()
		follower.Wait()
		r.mu.Lock()
		meant := r.removing[id]
		r.mu.Unlock()
		if !running || meant {
			return
		}
		if words := r.consoleEnd(id); words != "" {
			r.Log.Error("a microVM has ended by itself, and its guest said why", "id", id, "console", r.keepConsole(id), "last_words", words)
		}
	}
}

// keepConsole keeps the console of a microVM that failed. It returns the path, or "" if the guest said nothing.
func (r *Runtime) keepConsole(id string) string {
	return hypervisor.KeepConsole(r.consoleLog(id), r.dir(""), id)
}
