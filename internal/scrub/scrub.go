// Package scrub removes secrets from a relay's replies. A hostile relay, or one that quotes a command that it did not
// understand, repeats the credentials of AUTH: whole or in part, encoded, or in the reply to another command.
//
// The package finds
//   - whole secrets of four characters or more: plain, in base64, in hex, and percent-encoded;
//   - runs of twelve characters or more of a secret, or of its base64 at any offset in a base64 text.
//
// Letter case, white space, marks on letters, unprintable characters and invalid UTF-8 are ignored, so that a run may span lines
// and replies. A secret of less than eight characters is found only within one line or across a line end.
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

// Redacted replaces a secret.
const Redacted = "[redacted]"

const (
	gramLen   = 12 // length of a run of a secret's characters that is redacted
	shortest  = 4  // minimum length of a secret
	spreading = 8  // minimum length of a secret that is also found with white space in it

	filterLen = 4 // length of the character sequences in the filter
)

// Known holds the secrets that the last session of a client has sent. Sessions share it, because most send the same secrets, and
// a relay may repeat on one connection what it received on another. It is safe for concurrent use. The zero value holds no
// secrets.
type Known struct{ last atomic.Pointer[index] }

// Scrub returns text, which is not part of a session's replies, without the known secrets.
func (k *Known) Scrub(text string) string {
	s := k.NewStream()
	return s.Scrub(text)
}

// Stream scrubs the replies of one session, in order. It is not safe for concurrent use.
type Stream struct {
	known *Known
	index *index // nil while no secret is known
	given given  // secrets sent by this session
	dirty bool   // index is older than given
	norm  []byte // scratch: the end of the previous text followed by the current text, normalized
}

// NewStream returns the Stream of a new session. It knows the secrets in k.
func (k *Known) NewStream() Stream { return Stream{known: k, index: k.last.Load()} }

// Expect adds a secret that no session has sent yet: another client of the same relay may have sent it.
func (k *Known) Expect(secret string) {
	if len(secret) >= shortest {
		k.last.Store(newIndex(given{secrets: []string{secret}}))
	}
}

// Format implements fmt.Formatter: a Stream does not print.
func (s *Stream) Format(f fmt.State, _ rune) { f.Write([]byte(Redacted)) }

// Format implements fmt.Formatter: secrets do not print.
func (k *Known) Format(f fmt.State, _ rune) { f.Write([]byte(Redacted)) }

// Password adds a secret. A secret of less than four characters is not found.
func (s *Stream) Password(text string) { s.add(&s.given.secrets, text) }

// Name adds a user name. It is not redacted, even as part of a response, unless it is also added as a secret.
func (s *Stream) Name(text string) { s.add(&s.given.names, text) }

// Response adds a response of a SASL mechanism. The whole response is a secret, and so are its parts, except names.
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
	default: // XOAUTH2, OAUTHBEARER (RFC 7628) and any other mechanism
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

// ScrubApart returns text, which is not a reply, without the secrets.
func (s *Stream) ScrubApart(text string) string {
	s.update()
	apart := Stream{index: s.index}
	return apart.Scrub(text)
}

// update rebuilds the index if secrets were added.
func (s *Stream) update() {
	if s.dirty {
		s.dirty = false
		s.index = s.known.indexOf(s.given)
	}
}

// Scrub returns text, which follows the replies scrubbed before, without the secrets.
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

// given holds the secrets that one session has sent.
type given struct{ secrets, responses, names []string }

func (g given) equal(other given) bool {
	return slices.Equal(g.secrets, other.secrets) && slices.Equal(g.responses, other.responses) && slices.Equal(g.names, other.names)
}

func (g given) clone() given {
	return given{slices.Clone(g.secrets), slices.Clone(g.responses), slices.Clone(g.names)}
}

// indexOf returns the index of g. It makes a new index if g differs from the secrets sent last.
func (k *Known) indexOf(g given) *index {
	if x := k.last.Load(); x != nil && x.given.equal(g) {
		return x
	}
	x := newIndex(g.clone())
	k.last.Store(x)
	return x
}

// index finds secrets. It is immutable.
type index struct {
	given  given
	forms  *suffixarray.Index // forms of which any run of gramLen characters is found
	short  []short
	filter []uint64 // a Bloom filter of all sequences of filterLen characters in the forms
	run    int      // how many consecutive sequences must be in the filter before the index is searched
}

// short is a form that is found only as a whole.
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
	// Normalized text contains no NUL, so a NUL between forms prevents runs across two forms.
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

// without returns the parts of response between names.
func without(response string, names []string) []string {
	for _, n := range names {
		if len(n) > 2 {
			response = strings.ReplaceAll(response, n, "\x00")
		}
	}
	return strings.FieldsFunc(response, func(r rune) bool { return r <= 1 })
}

// inner returns the base64 of s within a text that has skip octets before s and more after it. It returns only the characters
// that do not depend on the surrounding octets.
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

// normal maps an ASCII character to the one it is compared as; 0 means that it is ignored. The two base64 alphabets are treated
// as one.
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

// appendNormal appends the normalized characters of text.
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

// appendRune appends a normalized non-ASCII character.
func appendRune(b []byte, r rune) []byte {
	// U+FFFD stands for invalid UTF-8.
	if !printable.Prints(r) || unicode.IsMark(r) || r == utf8.RuneError {
		return b
	}
	return utf8.AppendRune(b, unicode.ToLower(r))
}

// bit returns the filter's bit for a sequence of filterLen characters.
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

// suspects reports whether norm may contain a secret. It runs for every reply, so it is cheap.
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

// scrub returns text without the secrets in it; before is the end of the relay's previous text.
func (x *index) scrub(text string, before []byte) string {
	// from has, for each octet of norm after before, the offset of its character in text.
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
	shown := 0 // octets of text that are copied or redacted so far
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

// isWhole reports whether text[first:] up to the character at last is s, with nothing but line ends in between.
func (s short) isWhole(text string, first, last int) bool {
	_, size := utf8.DecodeRuneInString(text[last:])
	there := strings.NewReplacer("\r", "", "\n", "").Replace(text[first : last+size])
	return utf8.RuneCountInString(there) == utf8.RuneCountInString(strings.TrimSpace(s.text))
}
