package kata

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"sync"
	"time"

	"github.com/msbd/msbd/daemon/internal/backend/hypervisor"
	"github.com/msbd/msbd/daemon/internal/sys/tail"
)

func (r *Runtime) consoleLog(id string) string { return filepath.Join(r.dir(id), "console.log") }

// consoleTail returns the end of the console log of sandbox id.
func (r *Runtime) consoleTail(id string) string { return tail.Read(r.consoleLog(id), 1<<10) }

// logConsole appends the guest's console output to the sandbox's console log until ctx or the microVM ends. Kata's QEMU
// serves the console to one reader only. When ctx ends, logConsole keeps reading for consoleDrain to get the last
// output, unless the cause of ctx is errReady. If wait is set, it first waits until the console's socket exists.
func (r *Runtime) logConsole(ctx context.Context, id string, wait bool) {
	var console net.Conn
	dial := func() (err error) {
		console, err = net.Dial("unix", filepath.Join(vmRoot, id, "console.sock"))
		return err
	}
	if err := dial(); err != nil && (!wait || poll(ctx, bootPollInterval, func() bool { return dial() == nil }) != nil) {
		return
	}
	defer console.Close()
	defer context.AfterFunc(ctx, func() {
		end := time.Now()
		if !errors.Is(context.Cause(ctx), errReady) {
			end = end.Add(consoleDrain)
		}
		_ = console.SetDeadline(end)
	})()
	if err := hypervisor.CopyLog(ctx, r.consoleLog(id), console); err != nil {
		r.Log.Warn("could not log the microVM's console", "sandbox", id, "err", err)
	}
}

// watchConsole logs the console of a running microVM until done is called, which the caller does when the microVM has
// ended. If the microVM was not being removed, done writes the end of the console to the server's log.
func (r *Runtime) watchConsole(ctx context.Context, id string) (done func()) {
	ctx, stop := context.WithCancel(ctx)
	var reader sync.WaitGroup
	reader.Go(func() { r.logConsole(ctx, id, false) })
	return func() {
		canceled := ctx.Err() != nil // the server stops, but the microVM keeps running
		stop()
		reader.Wait()
		r.mu.Lock()
		removing := r.removing[id]
		r.mu.Unlock()
		if canceled || removing {
			return
		}
		if end := r.consoleTail(id); end != "" {
			r.Log.Error("a microVM ended unexpectedly; this is the end of its console", "sandbox", id, "console", r.keepConsole(id), "last_words", end)
		}
	}
}

// keepConsole keeps the console log of the failed sandbox id. It returns the new path, or "" if the log is empty or
// cannot be moved.
func (r *Runtime) keepConsole(id string) string {
	return hypervisor.KeepConsole(r.consoleLog(id), r.dir(""), id)
}
