package portalclient

import (
	"context"
	"errors"
	"io"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	portalv1 "github.com/msbd/msbd/api/msb/portal/v1"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

// pipe is a stream that has the bytes of Reader and then waits until it is closed, as that of a portal that has sent all.
type pipe struct {
	io.Reader
	ends   bool // the portal ends it after the bytes
	closed chan struct{}
}

func newPipe(text string, ends bool) *pipe {
	return &pipe{strings.NewReader(text), ends, make(chan struct{})}
}

func (p *pipe) Read(b []byte) (int, error) {
	n, err := p.Reader.Read(b)
	if err == io.EOF && !p.ends {
		<-p.closed
	}
	return n, err
}
func (p *pipe) Write([]byte) (int, error) { return 0, errors.New("nothing is sent to a transfer") }
func (p *pipe) Close() error {
	select {
	case <-p.closed:
	default:
		close(p.closed)
	}
	return nil
}

func TestTransfer(t *testing.T) {
	const length = 8
	offer := &portalv1.ReadFileResponse{
		Part: &portalv1.ReadFileResponse_Info{Info: &portalv1.FileInfo{Size: length}}, Transfer: &portalv1.Transfer{Length: length},
	}
	data := &portalv1.ReadFileResponse{Part: &portalv1.ReadFileResponse_Data{Data: []byte("messages")}}
	short := &portalv1.ReadFileResponse{Part: &portalv1.ReadFileResponse_Data{Data: []byte("mess")}}
	changed := status.Error(codes.FailedPrecondition, "the file changed")
	for name, tt := range map[string]struct {
		portal script
		stream *pipe // nil if the transfer cannot be opened
		want   string
		err    string
	}{
		"complete":            {scriptOf(1, nil, offer), newPipe("transfer", false), "transfer", ""},
		"longer than offered": {scriptOf(1, nil, offer), newPipe("transfer and more", false), "transfer", ""},
		"not opened":          {scriptOf(1, nil, offer, data), nil, "messages", ""},
		"refused":             {scriptOf(1, nil, offer, data), newPipe("", true), "messages", ""},
		"refused, no data":    {scriptOf(1, nil, offer), newPipe("", true), "", "too early"},
		"less data":           {scriptOf(1, nil, offer, short), nil, "mess", "too early"},
		"cut short":           {scriptOf(1, nil, offer), newPipe("trans", true), "trans", "too early"},
		"cut, then messages":  {scriptOf(1, nil, offer, data), newPipe("trans", true), "trans", "too early"},
		"cut, with a reason":  {scriptOf(1, changed, offer), newPipe("trans", true), "trans", "the file changed"},
		"fails at its end":    {scriptOf(1, changed, offer), newPipe("transfer", false), "transfer", "the file changed"},
	} {
		t.Run(name, func(t *testing.T) {
			c := tt.portal.connectWith(t, func(_ context.Context, id string) (io.ReadWriteCloser, error) {
				if len(id) != 32 {
					t.Errorf("the id is %q", id)
				}
				if tt.stream == nil {
					return nil, errors.New("cannot be opened")
				}
				return tt.stream, nil
			})
			info, file, err := c.ReadFile(t.Context(), sandbox.Path{Path: "/f"}, 0, -1)
			if err != nil || info.Size != length {
				t.Fatal(info, err)
			}
			got, err := io.ReadAll(file)
			if string(got) != tt.want || (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
				t.Errorf("read %q, %v; want %q, %q", got, err, tt.want, tt.err)
			}
			if n, again := file.Read(make([]byte, 1)); n != 0 || again == nil || err != nil && again != err {
				t.Errorf("another Read: %d bytes, %v", n, again)
			}
			if err := file.Close(); err != nil || len(c.transfers) != 0 {
				t.Errorf("Close: %v, %d transfers are left", err, len(c.transfers))
			}
			if tt.stream != nil {
				<-tt.stream.closed
			}
		})
	}
}

// The end of a call or of its connection ends the transfer, also while it is read.
func TestTransferEndsWithItsCall(t *testing.T) {
	offer := &portalv1.ReadFileResponse{Part: &portalv1.ReadFileResponse_Info{}, Transfer: &portalv1.Transfer{Length: 8}}
	reason := errors.New("the client is gone")
	for want, end := range map[error]func(*Client, context.CancelCauseFunc){
		reason:               func(_ *Client, cancel context.CancelCauseFunc) { cancel(reason) },
		sandbox.ErrRunFailed: func(c *Client, _ context.CancelCauseFunc) { c.Close() },
	} {
		stream := newPipe("trans", false)
		c := scriptOf(1, nil, offer).connectWith(t, func(context.Context, string) (io.ReadWriteCloser, error) { return stream, nil })
		ctx, cancel := context.WithCancelCause(t.Context())
		defer cancel(nil)
		_, file, err := c.ReadFile(ctx, sandbox.Path{Path: "/f"}, 0, -1)
		if err != nil {
			t.Fatal(err)
		}
		if n, err := io.ReadFull(file, make([]byte, 5)); err != nil {
			t.Fatal(n, err)
		}
		go end(c, cancel)
		if _, err := file.Read(make([]byte, 1)); !errors.Is(err, want) {
			t.Errorf("Read after the end: %v, want %v", err, want)
		}
		file.Close()
		<-stream.closed
	}
}

// Only some files at a time come over transfers. A portal that offers one that was not requested changes nothing.
func TestTransfersAreLimited(t *testing.T) {
	offer := &portalv1.ReadFileResponse{Part: &portalv1.ReadFileResponse_Info{}, Transfer: &portalv1.Transfer{Length: 8}}
	data := &portalv1.ReadFileResponse{Part: &portalv1.ReadFileResponse_Data{Data: []byte("messages")}}
	c := scriptOf(1, nil, offer, data).connectWith(t, func(context.Context, string) (io.ReadWriteCloser, error) { return newPipe("transfer", false), nil })
	for i := range maxTransfers + 1 {
		_, file, err := c.ReadFile(t.Context(), sandbox.Path{Path: "/f"}, 0, -1)
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		got := make([]byte, 8)
		want := "transfer"
		if i == maxTransfers {
			want = "messages"
		}
		if _, err := io.ReadFull(file, got); string(got) != want {
			t.Errorf("file %d: read %q, %v; want %q", i, got, err, want)
		}
	}
}
