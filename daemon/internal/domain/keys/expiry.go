package keys

import (
	"fmt"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/daemon/internal/sys/bounded"
)

const (
	daySeconds = 24 * 60 * 60
	lastYear   = 9999
)

// spanUnits maps each unit to its length in seconds or in calendar months.
var spanUnits = map[string]struct{ seconds, months int64 }{
	"s":  {seconds: 1},
	"m":  {seconds: 60},
	"h":  {seconds: 60 * 60},
	"d":  {seconds: daySeconds},
	"w":  {seconds: 7 * daySeconds},
	"mo": {months: 1},
	"y":  {months: 12},
}

// ParseExpiry returns the time that is s after now, in UTC. s is a number and a unit, such as 30s, 15m, 1.5h, 7d, 2w, 3mo
// or 1y, or several of these, such as 1w2d, which are applied from left to right. A number has at most three decimals;
// those of months and years have none. Months and years are calendar months and years: one month after January 31 is
// the last day of February. If s is empty, ParseExpiry returns the zero time, which means never. The error for an
// invalid s is errdefs.ErrInvalidArgument.
func ParseExpiry(s string, now time.Time) (time.Time, error) {
	if s == "" {
		return time.Time{}, nil
	}
	return parseSpan(expirySpan, s, now)
}

// ParseAge returns the time that is s before now, in UTC. s has the format that ParseExpiry accepts. One month before
// March 31 is the last day of February. If s is empty, ParseAge returns now. The error for an invalid s is
// errdefs.ErrInvalidArgument. It calls s what.
func ParseAge(what, s string, now time.Time) (time.Time, error) {
	if s == "" {
		return now.UTC(), nil
	}
	return parseSpan(spanKind(what), s, now)
}

// spanKind is what a span of time is for, as error messages call it. Any other kind than these is an age.
type spanKind string

const (
	expirySpan spanKind = "expiry"
	graceSpan  spanKind = "grace period"
)

// parseSpan returns the time that is s after now. If kind is an age, it returns the time that is s before now.
func parseSpan(kind spanKind, s string, now time.Time) (time.Time, error) {
	sign, tooFar := int64(1), fmt.Sprintf("is after the year %d", lastYear)
	switch kind {
	case expirySpan:
		tooFar += "; omit it for a key that never expires"
	case graceSpan:
	default:
		sign, tooFar = -1, "is before the year 1"
	}
	bad := func(format string, a ...any) (time.Time, error) {
		return time.Time{}, fmt.Errorf("%s %q: %s: %w", kind, bounded.Short(s), fmt.Sprintf(format, a...), errdefs.ErrInvalidArgument)
	}
	if strings.HasPrefix(s, "-") {
		return bad("must not be negative")
	}
	t := now.UTC()
	for rest := s; rest != ""; {
		number := rest[:len(rest)-len(strings.TrimLeft(rest, "0123456789."))]
		rest = rest[len(number):]
		name := rest
		if i := strings.IndexAny(rest, "0123456789"); i >= 0 {
			name = rest[:i]
		}
		rest = rest[len(name):]
		unit, known := spanUnits[name]
		switch {
		case number == "":
			return bad("put a number before %q, as in 7d", bounded.Short(name))
		case name == "":
			return bad("%q has no unit: add s, m (minutes), h, d, w, mo (months) or y", bounded.Short(number))
		case !known:
			return bad("unknown unit %q: use s, m (minutes), h, d, w, mo (months) or y", bounded.Short(name))
		}
		whole, decimals, hasPoint := strings.Cut(number, ".")
		switch {
		case hasPoint && (whole == "" || decimals == "" || len(decimals) > 3 || strings.Contains(decimals, ".")):
			return bad("%q must be a number with at most three decimals, as in 1.5h", bounded.Short(number))
		case hasPoint && unit.months > 0:
			return bad("the number of months or years must be a whole number; use a smaller unit")
		}
		var thousandths int64
		for _, digit := range (decimals + "000")[:3] {
			thousandths = thousandths*10 + int64(digit-'0')
		}
		number = strings.TrimLeft(whole, "0")
		switch {
		case number == "" && thousandths == 0:
			return bad("must not be zero")
		case len(number) > 12: // 12 digits cover 9999 years in seconds, and cannot overflow below
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
		t = t.Add(time.Duration(sign*thousandths*unit.seconds) * time.Millisecond)
		if t.Year() > lastYear || t.Year() < 1 {
			return bad("%s", tooFar)
		}
	}
	return t, nil
}

// addMonths is like t.AddDate(0, months, 0), but if the resulting month has no such day, it returns the last day of
// that month instead of a day in the next.
func addMonths(t time.Time, months int) time.Time {
	to := t.AddDate(0, months, 0)
	if to.Day() != t.Day() {
		to = to.AddDate(0, 0, -to.Day())
	}
	return to
}
