package sandboxtest

import (
	"io"

	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

// Result is the exit code and the output of a process.
type Result struct {
	ExitCode       int
	Stdout, Stderr string
}

// Read reads the events of a process until it exits, and closes it. Its arguments are the results of a method that starts a
// process; if err is not nil, Read returns it.
func Read(p sandbox.Process, err error) (r Result, _ error) {
	if err != nil {
		return r, err
	}
	defer p.Close()
	for {
		event, err := p.Next()
		if err == io.EOF {
			return r, nil
		}
		if err != nil {
			return r, err
		}
		switch event := event.(type) {
		case sandbox.Exit:
			r.ExitCode = event.Code
		case sandbox.Output:
			if event.Stream == sandbox.Stderr {
				r.Stderr += string(event.Data)
			} else {
				r.Stdout += string(event.Data)
			}
		}
	}
}
