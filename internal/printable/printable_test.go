// Here belongs what Quote, Address and Line make of a hostile text. Where the client uses them is tested in the root
// package.
package printable

import (
	"strconv"
	"strings"
	"testing"
	"unicode/utf8"
)

func TestForeignTextIsOneQuotedLine(t *testing.T) {
	for _, tt := range []struct{ why, text, want string }{
		{"plain words stay", "no such user", `"no such user"`},
		{"letters of other scripts stay", "Größe 日本", `"Größe 日本"`},
		{"nothing", "", `""`},
		{"a forged log line", "x\r\n2026/11/30 smtprelay: accepted", `"x\r\n2026/11/30 smtprelay: accepted"`},
		{"a terminal is not driven", "\x1b[2J\x07\x00\x7f", `"\x1b[2J\x07\x00\x7f"`},
		{"nor by C1", "\u009b2J\u0085", `"\u009b2J\u0085"`},
		{"quotes and backslashes", `"; check \n`, `"\"; check \\n"`},
		{"bidi controls", "\u202a\u202e\u2066\u2069\u200e\u200f\u061c", `"\u202a\u202e\u2066\u2069\u200e\u200f\u061c"`},
		{"what has no width", "\u200b\u200c\u200d\u2060\ufeff\u00ad\u034f", `"\u200b\u200c\u200d\u2060\ufeff\u00ad\u034f"`},
		{"what has width and no mark", "\u3164\u115f\ufe0f\u00a0", `"\u3164\u115f\ufe0f\u00a0"`},
		{"separators of lines and paragraphs", "\u2028\u2029", `"\u2028\u2029"`},
		{"tags beyond 16 bits", "\U000e0041", `"\U000e0041"`},
		{"what is no UTF-8", "\xff\xc3(\xe2\x80", `"\xff\xc3(\xe2\x80"`},
		{"a tab", "a\tb", `"a\tb"`},
	} {
		if got := Quote(tt.text, MostWords); got != tt.want {
			t.Errorf("%s: got %s, want %s", tt.why, got, tt.want)
		}
	}
}

func TestLongTextIsCutAndMarkedOutsideTheQuotes(t *testing.T) {
	for _, tt := range []struct{ why, text, want string }{
		{"just fits", "12345678", `"12345678"`},
		{"one too many", "123456789", `"12345678"...`},
		{"no rune is cut in two", "1234567é9", `"1234567"...`},
		{"what is no UTF-8 is cut anywhere", "\x80\x80\x80\x80\x80\x80\x80\x80\x80", `"\x80\x80\x80\x80\x80\x80\x80\x80"...`},
	} {
		if got := Quote(tt.text, 8); got != tt.want {
			t.Errorf("%s: got %s, want %s", tt.why, got, tt.want)
		}
	}
}

func TestAddressCannotLeaveItsBrackets(t *testing.T) {
	for _, tt := range []struct{ addr, want string }{
		{"b@y.example", "<b@y.example>"},
		{"jürgen@bücher.example", "<jürgen@bücher.example>"},
		{"", "<>"},
		{"a>: 550 \"no\"\r\n\u202e@x", `<a\x3e:\x20550\x20\"no\"\r\n\u202e@x>`},
		{strings.Repeat("a", 200), "<" + strings.Repeat("a", MostAddress) + "...>"},
	} {
		if got := Address(tt.addr); got != tt.want {
			t.Errorf("%q: got %s, want %s", tt.addr, got, tt.want)
		}
	}
}

func TestLineLeavesWhatWasQuotedAlone(t *testing.T) {
	text := `RCPT TO <b@y.example>: 550 5.1.1 "no\nsuch \"user\""; ask them`
	if got := Line(text); got != text {
		t.Errorf("got %s, want %s", got, text)
	}
	if got, want := Line("a\nb\u2028"), `a\nb\u2028`; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if got := Line(strings.Repeat("a", MostLine+1)); got != strings.Repeat("a", MostLine)+"..." {
		t.Errorf("got %d octets, want %d and a mark", len(got), MostLine)
	}
	if n := testing.AllocsPerRun(100, func() { Line(text) }); n != 0 {
		t.Errorf("%v allocations for a text that prints, want none", n)
	}
	plain := []string{"a@x.example", "b@y.example"}
	if got := Lines(plain); &got[0] != &plain[0] {
		t.Error("Lines has copied texts that print")
	}
	if got := Lines([]string{"a", "b\nc", "d\n"}); strings.Join(got, "|") != `a|b\nc|d\n` {
		t.Errorf("got %q", got)
	}
}

func FuzzPrintable(f *testing.F) {
	f.Add("no such user", 100)
	f.Add("x\r\n\x1b[2J\u202e\u2028\xff\"\\", 100)
	f.Add("1234567é9", 8)
	f.Fuzz(func(t *testing.T, text string, most int) {
		if most < 1 || most > 1<<16 {
			most = 8
		}
		quoted := Quote(text, most)
		for form, got := range map[string]string{"Quote": quoted, "Address": Address(text), "Line": Line(text)} {
			if !utf8.ValidString(got) {
				t.Errorf("%s: %q is no UTF-8", form, got)
			}
			for _, r := range got {
				if !Prints(r) || !strconv.IsPrint(r) {
					t.Fatalf("%s: %U in it", form, r)
				}
			}
		}
		literal, isCut := strings.CutSuffix(quoted, `"...`)
		if isCut {
			literal += `"`
		}
		back, err := strconv.Unquote(literal)
		switch {
		case err != nil:
			t.Fatalf("%s is no literal: %v", literal, err)
		case isCut != (len(text) > most):
			t.Errorf("%q, of which %d octets may be shown: got %s", text, most, quoted)
		case !isCut && back != text, isCut && (!strings.HasPrefix(text, back) || len(back) < most-utf8.UTFMax+1):
			t.Errorf("%q, of which %d octets may be shown: got %q back", text, most, back)
		}
		if inner := Address(text); strings.ContainsAny(inner[1:len(inner)-1], "<> ") || strings.Count(inner, `"`) != strings.Count(inner, `\"`) {
			t.Errorf("%q leaves its brackets: %s", text, inner)
		}
	})
}
