package keys

import (
	"fmt"
	"strings"
	"time"

	"github.com/containerd/errdefs"
)

const (
	daySeconds = 24 * 60 * 60
	lastYear   = 9999
)

// spanUnits maps a unit to its seconds or to its calendar months.
var spanUnits = map[string]struct{ seconds, months int64 }{
	"s":  {seconds: 1},
	"m":  {seconds: 60},
	"h":  {seconds: 60 * 60},
	"d":  {seconds: daySeconds},
	"w":  {seconds: 7 * daySeconds},
	"mo": {months: 1},
	"y":  {months: 12},
}

// ParseExpiry returns the moment that lies s after now, in UTC. s is a number and a unit, or several
// of them from left to right: 30s, 15m, 24h, 7d, 2w, 3mo, 1y, 1w2d. Months and years are those of the
// calendar: a month after January 31 is the last day of February. The empty s is never, the zero
// time. A bad s is errdefs.ErrInvalidArgument.
func ParseExpiry(s string, now time.Time) (time.Time, error) {
	if s == "" {
		return time.Time{}, nil
	}
	return parseSpan(s, now, 1)
}

// ParseAge returns the moment that lies s before now, in UTC; s is as ParseExpiry takes it. A month
// before March 31 is the last day of February. The empty s is now. A bad s is errdefs.ErrInvalidArgument.
func ParseAge(s string, now time.Time) (time.Time, error) {
	if s == "" {
		return now.UTC(), nil
	}
	return parseSpan(s, now, -1)
}

// parseSpan goes from now by s, in the direction that sign gives.
func parseSpan(s string, now time.Time, sign int64) (time.Time, error) {
	what, tooFar := "expiry", fmt.Sprintf("lies beyond the year %d; leave it out for a key that never expires", lastYear)
	if sign < 0 {
		what, tooFar = "age", "lies before the year 1"
	}
	bad := func(format string, a ...any) (time.Time, error) {
		return time.Time{}, fmt.Errorf("%s %q: %s: %w", what, abbreviate(s), fmt.Sprintf(format, a...), errdefs.ErrInvalidArgument)
	}
	if strings.HasPrefix(s, "-") {
		return bad("must not be negative")
	}
	t := now.UTC()
	for rest := s; rest != ""; {
		number := rest[:len(rest)-len(strings.TrimLeft(rest, "0123456789"))]
		rest = rest[len(number):]
		name := rest
		if i := strings.IndexAny(rest, "0123456789"); i >= 0 {
			name = rest[:i]
		}
		rest = rest[len(name):]
		unit, known := spanUnits[name]
		switch {
		case number == "":
			return bad("wants a whole number before %q, as in 7d", abbreviate(name))
		case name == "":
			return bad("%s what? Add a unit: s, m (minutes), h, d, w, mo (months) or y", abbreviate(number))
		case !known:
			return bad("unknown unit %q: use s, m (minutes), h, d, w, mo (months) or y", abbreviate(name))
		}
		number = strings.TrimLeft(number, "0")
		switch {
		case number == "":
			return bad("must not be zero")
		case len(number) > 12: // more seconds than 9999 years have, and small enough for what follows
			return bad("%s", tooFar)
		}
		var n int64
		for _, digit := range number {
			n = n*10 + int64(digit-'0')
		}
		if n*unit.months > 12*lastYear {
			return bad("%s", tooFar)
		}
		n *= sign
		t = addMonths(t, int(n*unit.months))
		t = time.Unix(t.Unix()+n*unit.seconds, int64(t.Nanosecond())).UTC()
		if t.Year() > lastYear || t.Year() < 1 {
			return bad("%s", tooFar)
		}
	}
	return t, nil
}

// addMonths is AddDate, but it stays in the month that it reaches where that is a shorter one.
func addMonths(t time.Time, months int) time.Time {
	to := t.AddDate(0, months, 0)
	if to.Day() != t.Day() {
		to = to.AddDate(0, 0, -to.Day())
	}
	return to
}

func abbreviate(s string) string {
	if len(s) > 40 {
		return s[:40] + "…"
	}
	return s
}
