// Package thread runs functions on threads of their own.
package thread

import (
	"runtime"

	"golang.org/x/sys/unix"
)

// Run runs f on a thread that runs nothing else before f returns, and that then ends. So f may change what belongs to its
// thread, such as its namespaces. The goroutines that f starts run on other threads.
func Run(f func() error) (err error) {
	ran := make(chan struct{})
	go func() {
		defer close(ran)
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() { // Go never ends the main thread, so leave f to another one
			defer runtime.UnlockOSThread()
			err = Run(f)
			return
		}
		// The thread is never unlocked, so it ends with this goroutine, and no other goroutine ever runs on it.
		err = f()
	}()
	<-ran
	return err
}
