// The text form of faults: what is read, what is refused, and that both forms say the same.
package devrelay

import (
	"strings"
	"testing"
)

func TestFaultsAreReadAsTheyAreWritten(t *testing.T) {
	for text, want := range map[string]FaultSpec{
		"rcpt=450 4.2.1 later": {At: "rcpt", Reply: "450 4.2.1 later"},
		"dot=451 4.7.1 later; drop; rcpt=bob@example.org; nth=2; every=10; count=3": {At: "dot", Reply: "451 4.7.1 later", Drop: true, Rcpt: "bob@example.org", Nth: 2, Every: 10, Count: 3},
		"mail=delay=2s":                {At: "mail", Delay: "2s"},
		"any=stall":                    {At: "any", Stall: true},
		"body=abort; after-bytes=1000": {At: "body", Abort: true, AfterBytes: 1000},
		"auth=discard; pipelined":      {At: "auth", Discard: true, Pipelined: true},
		"dot=454 slow; connection=3; after-messages=5; after-recipients=9; rate=0.5; burst=2": {At: "dot", Reply: "454 slow", Connection: 3, AfterMessages: 5, AfterRecipients: 9, Rate: 0.5, Burst: 2},
	} {
		got, err := ParseFault(text)
		if err != nil || got != want {
			t.Errorf("%s: %+v, %v", text, got, err)
		}
		if again, err := ParseFault(got.String()); err != nil || again != got {
			t.Errorf("%s is written %s, which is %+v, %v", text, got.String(), again, err)
		}
	}
}

func TestFaultsThatCannotBeMeantAreRefused(t *testing.T) {
	for text, want := range map[string]string{
		"":                                      "want STEP=REPLY",
		"rcpt":                                  "want STEP=REPLY",
		"rctp=450 later":                        `"rctp" is no step`,
		"rcpt 450 later; count=2":               "want STEP=REPLY",
		"rcpt=":                                 "is no reply",
		"rcpt=later":                            `"later" is no reply`,
		"rcpt=45 later":                         "three digits",
		"rcpt=150 later":                        "three digits",
		"rcpt=450later":                         "three digits",
		"rcpt=450-later":                        `"-" after it in all but the last`,
		"rcpt=450 a\r250 b":                     "three digits",
		"rcpt=450 a\n250 b":                     "one code",
		"rcpt=450 later; dorp":                  `"dorp" is no reply, and no option`,
		"rcpt=450 later; nth=x":                 "nth=x",
		"rcpt=450 later; nth=-1":                "negative",
		"rcpt=450 later; delay=2":               `delay "2"`,
		"rcpt=450 later; delay=-2s":             `delay "-2s"`,
		"rcpt=450 later; rate=NaN":              "rate NaN",
		"rcpt=count=1":                          "does nothing",
		"rcpt=450 " + strings.Repeat("x", 5000): "too long",
	} {
		if _, err := ParseFault(text); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %s", text, err, want)
		}
	}
	f := FaultSpec{At: "rcpt", Reply: "450-one\n450-two\n450 three"}
	if err := f.check(); err != nil {
		t.Errorf("a reply of three lines: %v", err)
	}
}

func TestEachStepHasAName(t *testing.T) {
	for _, name := range Steps() {
		if _, err := ParseFault(name + "=drop"); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}
