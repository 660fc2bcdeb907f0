package wire

import (
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// Extensions are the extensions that an EHLO reply offers (RFC 5321, 4.1.1.1).
type Extensions struct {
	Keywords []string // all keywords, in upper case, in the relay's order

	Size      int64    // SIZE: the largest message; 0 means no known limit (RFC 1870)
	Auth      []string // AUTH: mechanisms in upper case, in the relay's order, including those of the old form AUTH=
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

// Bounds on an EHLO reply; anything beyond is ignored. Real relays offer about twenty keywords and ten mechanisms, and the name
// of a mechanism has at most 20 octets (RFC 4422, 3.1).
const (
	MaxWords   = 128 // keywords, and mechanisms
	MaxWordLen = 64  // octets of a keyword or mechanism
)

// ParseEHLO parses the text of a positive reply to EHLO. The first line is a greeting; each other line is a keyword with its
// parameters. It ignores what it does not understand.
func ParseEHLO(text string) Extensions {
	var e Extensions
	_, rest, _ := strings.Cut(text, "\n")
	for line := range strings.SplitSeq(rest, "\n") {
		fields := strings.Fields(line)
		if len(fields) == 0 {
			continue
		}
		keyword, params := upper(fields[0]), fields[1:]
		// "AUTH=PLAIN LOGIN" is the form from before RFC 2554.
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

// upper converts ASCII letters to upper case. strings.ToUpper would also turn some other letters into ASCII.
func upper(s string) string {
	return strings.Map(func(r rune) rune {
		if 'a' <= r && r <= 'z' {
			return r - 'a' + 'A'
		}
		return r
	}, s)
}

// limitForm is the syntax of a limit, known or not (RFC 9422, 3): the value consists of visible ASCII except ";".
var limitForm = regexp.MustCompile(`^[A-Za-z0-9_-]+(=[!-:<-~]+)?$`)

// parseLimits parses "MAILMAX=100 RCPTMAX=50". It ignores invalid values and unknown names. If one element does not have the
// syntax of a limit, it ignores all (RFC 9422, 3.7).
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
