package rpc

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"path"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/msbd/msbd/daemon/internal/domain/keys"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/serve/wire"
)

// outputDirectory is the directory of a sandbox for the output of runs. Only root of the sandbox can create or replace it.
const outputDirectory = "/var/lib/msb/output"

// maxOutputFiles is how many files the directory has. A new one replaces the oldest one.
const maxOutputFiles = 8

// outputFileName matches the names of the files, which begin with the time, so that the oldest one is the first.
var outputFileName = regexp.MustCompile(`^[0-9]{8}T[0-9]{6}-[a-z2-7]{8}\.txt$`)

// maxFinish is how long a sandbox may take to complete a file after its run has ended.
const maxFinish = 30 * time.Second

// keepOutput makes the call keep the output of its run in a file of the sandbox n if the excerpt leaves something out and
// the key can read files. The file belongs to user, as in sandbox.Path.
func (s *Service) keepOutput(ctx context.Context, c *call, n sandbox.Name, user string) {
	if c.excerpt == nil || !c.Principal.Has(keys.ScopeFiles) {
		return
	}
	c.newOutputFile = func() *outputFile {
		name := fmt.Sprintf("%s-%s.txt", time.Now().UTC().Format("20060102T150405"), strings.ToLower(rand.Text()[:8]))
		data, w := io.Pipe()
		ctx, cancel := context.WithCancel(ctx)
		f := &outputFile{
			OutputFile: wire.OutputFile{Namespace: n.Namespace, Sandbox: n.Name, Path: path.Join(outputDirectory, name)},
			wait:       c.wait, cancel: cancel, pipe: w, written: make(chan error, 1),
		}
		go func() {
			err := s.writeOutput(ctx, n, sandbox.Path{Path: f.Path, User: user}, data)
			data.CloseWithError(errors.Join(errOutputFile, err)) // so that the run does not wait for the file
			f.written <- err
		}()
		return f
	}
}

// errOutputFile is the error of writing to a file that has failed.
var errOutputFile = errors.New("the file was not written")

// writeOutput writes data to a new file, and removes the oldest files.
func (s *Service) writeOutput(ctx context.Context, n sandbox.Name, file sandbox.Path, data io.Reader) error {
	mode := uint32(0o755)
	if _, _, err := s.sandboxes.MakeDirectory(ctx, n, sandbox.Path{Path: outputDirectory, User: "0:0"}, &mode); err != nil {
		return err
	}
	var names []string
	err := s.sandboxes.ListFiles(ctx, n, sandbox.Path{Path: outputDirectory}, 1, func(f sandbox.FileInfo) error {
		name := path.Base(f.Path)
		if !outputFileName.MatchString(name) {
			return nil
		}
		if names = append(names, name); len(names) > 10*maxOutputFiles {
			return errors.New("the directory has too many files")
		}
		return nil
	})
	if err != nil {
		return err
	}
	slices.Sort(names)
	for _, name := range names[:max(0, len(names)-maxOutputFiles+1)] {
		_ = s.sandboxes.RemoveFile(ctx, n, sandbox.Path{Path: path.Join(outputDirectory, name)}, false) // another run may have removed it
	}
	mode = 0o600
	_, _, err = s.sandboxes.WriteFile(ctx, n, file, sandbox.WriteOptions{Mode: &mode}, data)
	return err
}

// outputFile is a file of a sandbox to which the output of a run is written while the run prints. The memory that it needs does
// not depend on the size of the output: a run that prints faster than the sandbox writes waits.
type outputFile struct {
	wire.OutputFile
	wait    func(func())
	cancel  context.CancelFunc // ends the writing
	pipe    *io.PipeWriter
	written chan error // gets the result of the writing
	failed  bool
}

// write appends p to the file.
func (f *outputFile) write(p []byte) {
	if f.failed || len(p) == 0 {
		return
	}
	f.wait(func() {
		_, err := f.pipe.Write(p)
		f.failed = err != nil
	})
	f.Size += len(p)
}

// finish completes the file. It returns nil if the file could not be written.
func (f *outputFile) finish() (file *wire.OutputFile) {
	defer f.cancel()
	late := time.AfterFunc(maxFinish, f.cancel)
	defer late.Stop()
	f.wait(func() {
		_ = f.pipe.Close()
		if <-f.written == nil {
			file = &f.OutputFile
		}
	})
	return file
}
