// Package scrub takes secrets out of what a relay says. A hostile relay, and one that repeats what it did not understand,
// says back what it was given in AUTH: whole or in part, encoded, and as the answer to another command.
//
// Found are
//   - whole secrets of four characters or more: plain, in base64, in hex, and percent-encoded;
//   - runs of twelve characters or more of a secret, or of its base64, wherever in a base64 text it began.
//
// The case of letters is ignored. So are blanks, marks on letters, and what does not print or is no UTF-8: a run may be cut by the ends of lines and replies.
// Shorter secrets are found within one line, or across a line's end, if they have less than eight characters.
package scrub

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"index/suffixarray"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"
	"unicode"
	"unicode/utf8"

	"github.com/smtprelay/smtprelay/internal/printable"
)

// Redacted stands where a secret was.
const Redacted = "[redacted]"

const (
	gramLen   = 12 // characters of a secret that are not shown in a row
	shortest  = 4  // characters of the shortest secret that is looked for
	spreading = 8  // characters of the shortest one that is found with blanks in it

	filterLen = 4 // characters that the filter knows to be in some form of a secret
)

// Known is what the sessions of one client have given away, as far as the last of them goes. Sessions share it: most give
// away the same, and what a relay has heard on one connection it may say on the next. It is safe for concurrent use, and
// its zero value knows nothing.
type Known struct{ last atomic.Pointer[index] }

// Scrub returns text, which is not part of the stream of a session's replies, without the secrets that are known.
func (k *Known) Scrub(text string) string {
	s := k.NewStream()
	return s.Scrub(text)
}

// Stream scrubs the replies of one session, in their order. It is not safe for concurrent use.
type Stream struct {
	known *Known
	index *index // nil while nothing is known
	given given  // by this session
	dirty bool   // index is older than given
	norm  []byte // scratch: the end of what was said before, and a text, normalized
}

// NewStream returns the Stream of a new session, which knows what the sessions before it gave away.
func (k *Known) NewStream() Stream { return Stream{known: k, index: k.last.Load()} }

// Expect makes a secret known that no session has given away yet: another client may have done so.
func (k *Known) Expect(secret string) {
	if len(secret) >= shortest {
		k.last.Store(newIndex(given{secrets: []string{secret}}))
	}
}

// Format implements fmt.Formatter: a Stream does not print.
func (s *Stream) Format(f fmt.State, _ rune) { f.Write([]byte(Redacted)) }

// Format implements fmt.Formatter: what is known does not print.
func (k *Known) Format(f fmt.State, _ rune) { f.Write([]byte(Redacted)) }

// Password adds a whole secret. Nothing is found of one that has less than four characters.
func (s *Stream) Password(text string) { s.add(&s.given.secrets, text) }

// Name adds a user name, which is no secret even as a part of a response, unless it is added as a secret too.
func (s *Stream) Name(text string) { s.add(&s.given.names, text) }

// Response adds a response of a mechanism, which is a secret as a whole, and so are its parts but those that are names.
func (s *Stream) Response(mechanism string, response []byte) {
	text := string(response)
	s.add(&s.given.responses, text)
	parts := strings.FieldsFunc(text, func(r rune) bool { return r <= 1 })
	switch {
	case mechanism == "PLAIN" && strings.Count(text, "\x00") == 2: // RFC 4616
		names, password := text[:strings.LastIndexByte(text, 0)], text[strings.LastIndexByte(text, 0)+1:]
		for name := range strings.SplitSeq(names, "\x00") {
			s.Name(name)
		}
		s.Password(password)
	case mechanism == "CRAM-MD5": // RFC 2195
		i := strings.LastIndexByte(text, ' ')
		s.Name(text[:max(i, 0)])
		s.Password(text[i+1:])
	case strings.HasPrefix(mechanism, "SCRAM-"): // RFC 5802
		s.attributes(text)
	case len(parts) < 2:
		s.Password(text)
	default: // XOAUTH2, OAUTHBEARER (RFC 7628), and whatever there is
		for _, part := range parts {
			scheme, token, ok := strings.Cut(part, " ")
			switch {
			case ok && strings.HasPrefix(strings.ToLower(scheme), "auth="):
				s.Password(token)
			case !s.attributes(part) && len(part) >= spreading:
				s.Password(part)
			}
		}
	}
}

// attributes adds the names in a list such as "n,a=ann@x.example", and reports whether there are any.
func (s *Stream) attributes(list string) (found bool) {
	for attribute := range strings.SplitSeq(list, ",") {
		if key, value, ok := strings.Cut(attribute, "="); ok && slices.Contains([]string{"user", "a", "n", "host", "port"}, key) {
			s.Name(value)
			found = true
		}
	}
	return found
}

func (s *Stream) add(list *[]string, text string) {
	if text != "" && !slices.Contains(*list, text) {
		*list = append(*list, text)
		s.dirty = true
	}
}

// ScrubApart returns text, which is no reply, without the secrets.
func (s *Stream) ScrubApart(text string) string {
	s.update()
	apart := Stream{index: s.index}
	return apart.Scrub(text)
}

// update makes the index know all that was given.
func (s *Stream) update() {
	if s.dirty {
		s.dirty = false
		s.index = s.known.indexOf(s.given)
	}
}

// Scrub returns text, which the relay said behind all that was scrubbed before, without the secrets.
func (s *Stream) Scrub(text string) string {
	s.update()
	x := s.index
	if x == nil || text == "" {
		return text
	}
	before := min(len(s.norm), gramLen-1)
	copy(s.norm, s.norm[len(s.norm)-before:])
	s.norm = appendNormal(s.norm[:before], text)
	if !x.suspects(s.norm) {
		return text
	}
	return x.scrub(text, s.norm[:before])
}

// given is what one session gave away.
type given struct{ secrets, responses, names []string }

func (g given) equal(other given) bool {
	return slices.Equal(g.secrets, other.secrets) && slices.Equal(g.responses, other.responses) && slices.Equal(g.names, other.names)
}

func (g given) clone() given {
	return given{slices.Clone(g.secrets), slices.Clone(g.responses), slices.Clone(g.names)}
}

// indexOf returns the index of g, which is made anew if g is not what was given away last.
func (k *Known) indexOf(g given) *index {
	if x := k.last.Load(); x != nil && x.given.equal(g) {
		return x
	}
	x := newIndex(g.clone())
	k.last.Store(x)
	return x
}

// index finds secrets. It does not change.
type index struct {
	given  given
	forms  *suffixarray.Index // those of which any run of gramLen characters is found
	short  []short
	filter []uint64 // a bit for the hash of each filterLen characters that stand in a form
	run    int      // how many in a row must be in the filter for something to be found
}

// short is a form that is found as a whole only.
type short struct {
	text string
	norm string // text, normalized
}

func newIndex(g given) *index {
	var forms [][]byte
	x := &index{given: g, run: gramLen - filterLen + 1}
	add := func(text string, whole bool) {
		norm := string(appendNormal(nil, text))
		switch {
		case len(norm) >= gramLen:
			forms = append(forms, []byte(norm))
		case whole && len(norm) >= filterLen && !slices.ContainsFunc(x.short, func(s short) bool { return s.norm == norm }):
			x.short = append(x.short, short{text, norm})
			x.run = min(x.run, len(norm)-filterLen+1)
		}
	}
	for _, s := range g.secrets {
		if len(s) < shortest {
			continue
		}
		add(s, true)
		add(hex.EncodeToString([]byte(s)), true)
		add(url.PathEscape(s), true)
		add(url.QueryEscape(s), true)
		add(percent(s), true)
	}
	for _, r := range g.responses {
		for _, piece := range without(r, g.names) {
			add(piece, false)
		}
	}
	for _, s := range slices.Concat(g.secrets, g.responses) {
		if len(s) < shortest || slices.Contains(g.names, s) && !slices.Contains(g.secrets, s) {
			continue
		}
		add(base64.RawStdEncoding.EncodeToString([]byte(s)), true)
		add(inner(s, 0), false)
		add(inner(s, 1), false)
		add(inner(s, 2), false)
	}
	// No normalized text has a NUL, which keeps the end of one form from making a run with the beginning of another.
	all := bytes.Join(forms, []byte{0})
	x.forms = suffixarray.New(all)
	size := 64
	for size < 16*len(all) {
		size *= 2
	}
	x.filter = make([]uint64, size/64)
	x.note(all)
	for _, s := range x.short {
		x.note([]byte(s.norm))
	}
	return x
}

// without returns what is left of response when names are cut out of it.
func without(response string, names []string) []string {
	for _, n := range names {
		if len(n) > 2 {
			response = strings.ReplaceAll(response, n, "\x00")
		}
	}
	return strings.FieldsFunc(response, func(r rune) bool { return r <= 1 })
}

// inner returns the base64 of s as it stands in that of a text which has skip octets in front of s, and others behind: only the
// characters that do not depend on those.
func inner(s string, skip int) string {
	text := base64.RawStdEncoding.EncodeToString(append(make([]byte, skip), s...))
	end := (skip + len(s)) * 8 / 6
	begin := (skip*8 + 5) / 6
	return text[min(begin, end):end]
}

// percent encodes every octet of s.
func percent(s string) string {
	var b strings.Builder
	for _, c := range []byte(s) {
		fmt.Fprintf(&b, "%%%02x", c)
	}
	return b.String()
}

// normal is what a character is compared as; 0 means that it is passed over. The two alphabets of base64 are one.
var normal = func() (n [utf8.RuneSelf]byte) {
	for c := byte('!'); c <= '~'; c++ {
		n[c] = c
	}
	for c := byte('A'); c <= 'Z'; c++ {
		n[c] = c + 'a' - 'A'
	}
	n['-'], n['_'] = '+', '/'
	return n
}()

// appendNormal appends the characters of text as they are compared.
func appendNormal(b []byte, text string) []byte {
	for i := 0; i < len(text); {
		if c := text[i]; c < utf8.RuneSelf {
			if c = normal[c]; c != 0 {
				b = append(b, c)
			}
			i++
			continue
		}
		r, size := utf8.DecodeRuneInString(text[i:])
		b = appendRune(b, r)
		i += size
	}
	return b
}

// appendRune appends a character beyond ASCII as it is compared.
func appendRune(b []byte, r rune) []byte {
	// U+FFFD stands where a reply was no UTF-8.
	if !printable.Prints(r) || unicode.IsMark(r) || r == utf8.RuneError {
		return b
	}
	return utf8.AppendRune(b, unicode.ToLower(r))
}

// bit is the filter's for filterLen characters.
func (x *index) bit(gram uint32) (word int, mask uint64) {
	n := gram * 0x9E3779B1 >> 7 & uint32(64*len(x.filter)-1)
	return int(n / 64), 1 << (n % 64)
}

func (x *index) note(norm []byte) {
	var gram uint32
	for i, c := range norm {
		if gram = gram<<8 | uint32(c); i >= filterLen-1 {
			word, mask := x.bit(gram)
			x.filter[word] |= mask
		}
	}
}

// suspects reports whether there may be a secret in norm. It is what every reply of every session costs.
func (x *index) suspects(norm []byte) bool {
	var gram uint32
	run := 0
	for i, c := range norm {
		gram = gram<<8 | uint32(c)
		if word, mask := x.bit(gram); x.filter[word]&mask == 0 {
			run = 0
		} else if i >= filterLen-1 {
			if run++; run >= x.run {
				return true
			}
		}
	}
	return false
}

// scrub returns text without the secrets in it, before which the relay has said before.
func (x *index) scrub(text string, before []byte) string {
	// Each octet of norm, from len(before) on, comes from the character of text at from.
	norm := slices.Clone(before)
	from := make([]int, len(before), len(before)+len(text))
	for i := 0; i < len(text); {
		_, size := utf8.DecodeRuneInString(text[i:])
		had := len(norm)
		norm = appendNormal(norm, text[i:i+size])
		for range norm[had:] {
			from = append(from, i)
		}
		i += size
	}
	secret := make([]bool, len(norm))
	mark := func(begin, end int) {
		for i := begin; i < end; i++ {
			secret[i] = true
		}
	}
	for i := 0; i+gramLen <= len(norm); i++ {
		if x.forms.Lookup(norm[i:i+gramLen], 1) != nil {
			mark(i, i+gramLen)
		}
	}
	for _, s := range x.short {
		for i := 0; ; i++ {
			n := bytes.Index(norm[i:], []byte(s.norm))
			if n < 0 {
				break
			}
			i += n
			end := i + len(s.norm)
			if len(s.norm) >= spreading || i >= len(before) && s.isWhole(text, from[i], from[end-1]) {
				mark(i, end)
			}
		}
	}
	var b strings.Builder
	shown := 0 // of text, or left out
	for i := len(before); i < len(norm); i++ {
		if !secret[i] {
			continue
		}
		b.WriteString(text[shown:from[i]])
		b.WriteString(Redacted)
		for i+1 < len(norm) && secret[i+1] {
			i++
		}
		_, size := utf8.DecodeRuneInString(text[from[i]:])
		shown = from[i] + size
		for padding := 0; padding < 2 && strings.HasPrefix(text[shown:], "="); padding++ { // of base64
			shown++
		}
	}
	if shown == 0 {
		return text
	}
	b.WriteString(text[shown:])
	return b.String()
}

// isWhole reports whether text has s from the character at first to that at last, with nothing between but line ends.
func (s short) isWhole(text string, first, last int) bool {
	_, size := utf8.DecodeRuneInString(text[last:])
	there := strings.NewReplacer("\r", "", "\n", "").Replace(text[first : last+size])
	return utf8.RuneCountInString(there) == utf8.RuneCountInString(strings.TrimSpace(s.text))
}
