package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"net"
	"os"
	"time"
)

const (
	// responseTimeout bounds the wait for the response to one request.
	responseTimeout = time.Second
	// syncTimeout bounds SyncClock.
	syncTimeout = 10 * time.Second
	// maxAttempts is how often a request without a response is sent.
	maxAttempts = 5
	// maxStale is how many responses to other requests Client ignores while it waits for one response. A guest that
	// responds to each request sends no more than this.
	maxStale = 2 * maxAttempts
	// A measurement ends when it is this precise, or after maxExchanges requests.
	goodPrecision = 500 * time.Microsecond
	maxExchanges  = 20
	// maxRounds is how often SyncClock measures the clock again after a correction that got no response.
	maxRounds = 3
	// portalPause is the time between two requests of AwaitPortal, in case a guest does not wait itself.
	portalPause = 10 * time.Millisecond
	// tolerance is an error of the clock that is not corrected.
	tolerance = 500 * time.Microsecond
)

// Client is the host's end of a connection to a guest's control port. One goroutine at a time may use it.
type Client struct {
	conn  net.Conn
	lines lineReader
	id    uint64 // of the last request
}

// Dial connects to the agent's control port, whose host end is the Unix socket at path.
func Dial(ctx context.Context, path string) (*Client, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("connect to the control port: %w", err)
	}
	return newClient(conn), nil
}

func newClient(conn net.Conn) *Client {
	// The guest may still respond to requests of an earlier client, so ids must not begin at the same number each time.
	return &Client{conn: conn, lines: lineReader{r: conn}, id: rand.Uint64()}
}

// Close closes the connection.
func (c *Client) Close() error { return c.conn.Close() }

// SyncClock measures how far the guest's clock differs from the host's, and corrects the guest's clock if it is wrong. It
// fails if the guest does not respond within 10 s.
//
// The guest corrects small differences gradually. So the clock may still differ by some milliseconds when SyncClock
// returns.
func (c *Client) SyncClock(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, syncTimeout)
	defer cancel()
	for range maxRounds {
		ahead, precision, err := c.measure(ctx)
		if err != nil {
			return fmt.Errorf("read the guest's clock: %w", err)
		}
		if ahead.Abs() <= precision+tolerance {
			return nil
		}
		// If the response is lost, it is unknown whether the guest has moved its clock. So measure again, instead of
		// sending the same request again. The guest handles requests in the order in which they were sent.
		_, err = c.exchange(ctx, Request{Adjust: int64(-ahead)})
		if err == nil {
			return nil
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return fmt.Errorf("correct the guest's clock by %v: %w", -ahead, err)
		}
	}
	return errors.New("correct the guest's clock: the guest does not respond")
}

// measure returns how far the guest's clock is ahead of the host's, and how exact this is. It uses the fastest of several
// exchanges.
func (c *Client) measure(ctx context.Context) (ahead, precision time.Duration, err error) {
	precision = math.MaxInt64
	for n := 0; n < maxExchanges && precision > goodPrecision; n++ {
		r, err := c.readClock(ctx)
		if err != nil {
			return 0, 0, err
		}
		if half := r.roundTrip / 2; half < precision {
			// The guest read its clock at some time of the exchange.
			ahead, precision = r.guest.Sub(r.sent.Add(half)), half
		}
	}
	return ahead, precision, nil
}

// clockReading is the guest's time at some point of an exchange.
type clockReading struct {
	sent      time.Time // the host's time when it sent the request
	roundTrip time.Duration
	guest     time.Time
}

// readClock reads the guest's clock.
func (c *Client) readClock(ctx context.Context) (clockReading, error) {
	resp, sent, err := c.repeat(ctx, Request{})
	if err != nil {
		return clockReading{}, err
	}
	// Without its monotonic part, Sub compares the time with the wall clock of the host.
	return clockReading{sent.Round(0), time.Since(sent), time.Unix(0, resp.Time)}, nil
}

// Personalize makes a guest another one than those that were restored from the same state: it reseeds the random number
// generator of the guest's kernel with seed, which has SeedSize random bytes, and sets the token with which msbd connects to the
// portal. After that, the shim may connect to the agent.
func (c *Client) Personalize(ctx context.Context, seed []byte, token string) error {
	if len(seed) == 0 || token == "" {
		return errors.New("personalize the guest: there is no seed or no token")
	}
	if _, _, err := c.repeat(ctx, Request{Seed: seed, Token: token}); err != nil {
		return fmt.Errorf("personalize the guest: %w", err)
	}
	return nil
}

// SetHostname sets the hostname of the guest's container.
func (c *Client) SetHostname(ctx context.Context, name string) error {
	if name == "" {
		return errors.New("set the guest's hostname: it is empty")
	}
	if _, _, err := c.repeat(ctx, Request{Hostname: name}); err != nil {
		return fmt.Errorf("set the guest's hostname: %w", err)
	}
	return nil
}

// AwaitPortal waits until the guest's portal takes connections or ctx is done.
func (c *Client) AwaitPortal(ctx context.Context) error {
	for {
		resp, err := c.exchange(ctx, Request{AwaitPortal: true})
		if err == nil && resp.Ready {
			return nil
		}
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			return fmt.Errorf("wait for the guest's portal: %w", err)
		}
		select {
		case <-ctx.Done(): // the next exchange returns that
		case <-time.After(portalPause):
		}
	}
}

// repeat makes an exchange. If there is no response within responseTimeout, it sends the request again: a guest responds late
// if it is busy, or was stopped, and a measurement that takes so long is not precise. sent is when the last request was sent.
func (c *Client) repeat(ctx context.Context, req Request) (resp Response, sent time.Time, err error) {
	for attempt := 1; ; attempt++ {
		sent = time.Now()
		resp, err = c.exchange(ctx, req)
		if err == nil || attempt == maxAttempts || !errors.Is(err, os.ErrDeadlineExceeded) {
			return resp, sent, err
		}
	}
}

// exchange sends a request once, with a new id, and returns the response. If there is none within responseTimeout, it
// returns os.ErrDeadlineExceeded. It returns the error of ctx if ctx ends earlier.
func (c *Client) exchange(ctx context.Context, req Request) (Response, error) {
	if err := ctx.Err(); err != nil {
		return Response{}, err
	}
	if err := req.check(); err != nil {
		return Response{}, err
	}
	if err := c.conn.SetDeadline(time.Now().Add(responseTimeout)); err != nil {
		return Response{}, err
	}
	stop := context.AfterFunc(ctx, func() { _ = c.conn.SetDeadline(time.Unix(1, 0)) })
	resp, err := c.exchangeUntilDeadline(req)
	if !stop() && err != nil {
		return Response{}, ctx.Err()
	}
	return resp, err
}

// exchangeUntilDeadline is exchange until the deadline of the connection.
func (c *Client) exchangeUntilDeadline(req Request) (Response, error) {
	c.id++
	req.ID = c.id
	line, err := encode(req)
	if err != nil {
		return Response{}, err
	}
	if _, err := c.conn.Write(line); err != nil {
		return Response{}, err
	}
	for range maxStale {
		resp, err := readResponse(&c.lines)
		if err != nil {
			return Response{}, err
		}
		if resp.ID != req.ID {
			continue // it responds to a request that was given up, or to one of an earlier client
		}
		if resp.Error != "" {
			return Response{}, fmt.Errorf("the guest says %.200q", resp.Error)
		}
		return resp, nil
	}
	return Response{}, errors.New("the guest sends responses to other requests")
}

// readResponse reads the guest's next response.
func readResponse(lines *lineReader) (Response, error) {
	line, err := lines.next()
	if err != nil {
		return Response{}, err
	}
	var resp Response
	if err := json.Unmarshal(line, &resp); err != nil {
		return Response{}, fmt.Errorf("the guest sent no response but %.200q", line)
	}
	return resp, nil
}
