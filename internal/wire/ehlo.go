package wire

import (
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// Extensions is what an EHLO reply offers (RFC 5321, 4.1.1.1).
type Extensions struct {
	Keywords []string // all of them, in upper case, in the relay's order

	Size      int64    // SIZE: the largest message; 0 means no known limit (RFC 1870)
	Auth      []string // AUTH: mechanisms in upper case, the relay's order, those of the old form AUTH= included
	Limits    Limits
	DeliverBy int64 // DELIVERBY: the shortest time in seconds; 0 means none
}

// Limits is the LIMITS extension (RFC 9422). 0 means not announced.
type Limits struct {
	MailMax       int // MAIL commands in a session
	RcptMax       int // RCPT commands in a transaction
	RcptDomainMax int // different recipient domains in a session
}

// Has reports whether the relay offers keyword, which is in upper case.
func (e *Extensions) Has(keyword string) bool { return slices.Contains(e.Keywords, keyword) }

// Bounds on what is taken from an EHLO reply; the rest is left out. Real relays offer some twenty keywords and ten mechanisms,
// and a name of a mechanism has 20 octets at most (RFC 4422, 3.1).
const (
	MaxWords   = 128 // keywords, and mechanisms
	MaxWordLen = 64  // octets of one
)

// ParseEHLO reads the text of a positive reply to EHLO. The first line is a greeting, each other one a keyword and its
// parameters. What it does not understand it leaves out.
func ParseEHLO(text string) Extensions {
	var e Extensions
	_, rest, _ := strings.Cut(text, "\n")
	for line := range strings.SplitSeq(rest, "\n") {
		fields := strings.Fields(line)
		if len(fields) == 0 {
			continue
		}
		keyword, params := upper(fields[0]), fields[1:]
		// "AUTH=PLAIN LOGIN" is how it was written before RFC 2554.
		if mechanism, ok := strings.CutPrefix(keyword, "AUTH="); ok {
			keyword, params = "AUTH", append([]string{mechanism}, params...)
		}
		e.Keywords = addWord(e.Keywords, keyword)
		switch keyword {
		case "SIZE":
			if len(params) > 0 {
				if n, err := strconv.ParseInt(params[0], 10, 64); err == nil && n > 0 {
					e.Size = n
				}
			}
		case "AUTH":
			for _, m := range params {
				e.Auth = addWord(e.Auth, upper(m))
			}
		case "LIMITS":
			e.Limits = parseLimits(params)
		case "DELIVERBY":
			if len(params) > 0 {
				if n, err := strconv.ParseInt(params[0], 10, 64); err == nil && n > 0 {
					e.DeliverBy = n
				}
			}
		}
	}
	return e
}

// addWord adds word if it is new, not too long, and there is room.
func addWord(words []string, word string) []string {
	if word != "" && len(word) <= MaxWordLen && len(words) < MaxWords && !slices.Contains(words, word) {
		words = append(words, word)
	}
	return words
}

// upper puts ASCII letters in upper case. It leaves others alone, some of which strings.ToUpper makes ASCII ones of.
func upper(s string) string {
	return strings.Map(func(r rune) rune {
		if 'a' <= r && r <= 'z' {
			return r - 'a' + 'A'
		}
		return r
	}, s)
}

// limitForm is the form of a limit, known or not (RFC 9422, 3): the value is anything visible in ASCII but ";".
var limitForm = regexp.MustCompile(`^[A-Za-z0-9_-]+(=[!-:<-~]+)?$`)

// parseLimits reads "MAILMAX=100 RCPTMAX=50". A value that is broken or a name that is unknown is ignored, and all of them if
// one has not even the form of a limit (RFC 9422, 3.7).
func parseLimits(params []string) (l Limits) {
	for _, p := range params {
		if !limitForm.MatchString(p) {
			return Limits{}
		}
		name, value, _ := strings.Cut(p, "=")
		n, err := strconv.ParseUint(value, 10, 32)
		if err != nil || n < 1 || n > 999999 {
			continue
		}
		switch upper(name) {
		case "MAILMAX":
			l.MailMax = int(n)
		case "RCPTMAX":
			l.RcptMax = int(n)
		case "RCPTDOMAINMAX":
			l.RcptDomainMax = int(n)
		}
	}
	return l
}
