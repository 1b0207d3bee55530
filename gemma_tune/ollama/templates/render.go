// Renders an Ollama TEMPLATE with Go's own text/template: a question as JSON on standard input, the texts as JSON on
// standard output. go_template.py prepares the question.
package main

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"text/template"
	"text/template/parse"
)

type message struct {
	Role, Content, Thinking string
	ToolCalls               []any
}

// A conversation is one rendering, or, where the template is of the older kind, one for each exchange. Values of the
// last exchange are rendered up to the place of the answer.
type question struct {
	Template      string
	Conversations [][]struct {
		System, Prompt, Response string
		Messages                 []*message
		Cut                      bool
	}
}

func main() {
	var asked question
	check(json.NewDecoder(os.Stdin).Decode(&asked))
	whole, cut := parsed(asked.Template), parsed(asked.Template)
	cutAtResponse(cut.Root)
	texts := []string{}
	for _, conversation := range asked.Conversations {
		var text strings.Builder
		for _, values := range conversation {
			use := whole
			if values.Cut {
				use = cut
			}
			check(use.Execute(&text, map[string]any{
				"System": values.System, "Prompt": values.Prompt, "Response": values.Response,
				"Messages": values.Messages, "Tools": nil, "Think": false, "ThinkLevel": "", "IsThinkSet": false,
			}))
		}
		texts = append(texts, text.String())
	}
	check(json.NewEncoder(os.Stdout).Encode(texts))
}

func parsed(source string) *template.Template {
	toJSON := func(value any) string {
		text, _ := json.Marshal(value)
		return string(text)
	}
	result, err := template.New("").Option("missingkey=zero").Funcs(template.FuncMap{"json": toJSON}).Parse(source)
	check(err)
	return result
}

// cutAtResponse leaves out the first node that prints .Response and all that follows it; true if there was one.
func cutAtResponse(list *parse.ListNode) bool {
	if list == nil {
		return false
	}
	for n, node := range list.Nodes {
		found, kept := false, n+1
		switch node := node.(type) {
		case *parse.ActionNode:
			found, kept = strings.Contains(node.String(), ".Response"), n
		case *parse.IfNode:
			found = cutAtResponse(node.List) || cutAtResponse(node.ElseList)
		case *parse.WithNode:
			found = cutAtResponse(node.List) || cutAtResponse(node.ElseList)
		case *parse.RangeNode:
			found = cutAtResponse(node.List) || cutAtResponse(node.ElseList)
		}
		if found {
			list.Nodes = list.Nodes[:kept]
			return true
		}
	}
	return false
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
